"""sampling.py on mocks: verdicts, resume, refusals; and on real engines, sound and with a planted bias."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ab_harness import MockLauncher
from mock_engine import MockEngine, Settings

from laguna_serve.bench import sampling
from laguna_serve.bench.arms import arms
from laguna_serve.bench.sampled import verdict
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import read_flags
from laguna_serve.serving.kit.results import read_result

TOY = Path(__file__).resolve().parents[2] / "toy"
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")]
# A plugin of vLLM's under which every draft with a fair chance is accepted, as if the drafter knew best.
BIAS = """
from laguna_serve.plugins.repairs import drafted_sampling


def register():
    judge = drafted_sampling.verify_drawn

    def accept(logits, temperature, drafts, counts, draft_probs):
        owners = [request for request, count in enumerate(counts) for _ in range(count)]
        for place, (request, draft) in enumerate(zip(owners, drafts.tolist())):
            row = place + request
            if logits[row].float().softmax(-1)[draft] > 0.3:
                logits[row, draft] += 50
        return judge(logits, temperature, drafts, counts, draft_probs)

    drafted_sampling.verify_drawn = accept
"""


class GammaEngine(MockLauncher):
    """A mock that behaves by its γ."""

    by_gamma: ClassVar[dict[int | None, Settings]] = {}
    seeds: ClassVar[tuple[int, ...]] = ()

    def choose(self, config: EngineConfig) -> Settings:
        type(self).seeds += (config.seed,)
        found = type(self).by_gamma.get(config.gamma, Settings())
        return found if config.gamma is None else replace(found, gamma=config.gamma, drafts_per_answer=1)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[GammaEngine]:
    made = type("Made", (GammaEngine,), {"by_gamma": {}, "seeds": ()})
    monkeypatch.setattr(arms, "Engine", made)
    monkeypatch.setattr(verdict, "TRIALS", 4)
    return made


@pytest.fixture
def run(prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_sampling(*more: str) -> tuple[int, dict[str, Any], str]:
        size = ["--num-prompts", "4", "--completions", "120", "--tokens", "4", "--gammas", "1,3", "--level", "0.001"]
        status = sampling.main([*PAIR, "--prompts", str(prompts_file), *size, "--out", str(tmp_path / "s"), *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, " ".join((captured.out + captured.err).split())

    return run_sampling


@pytest.mark.slow
def test_sound_arms_do_not_differ(engines: type[GammaEngine], run: Any, tmp_path: Path) -> None:
    status, result, output = run()
    assert status == 0
    assert [row["arm"] for row in result["comparisons"]] == ["baseline again", "γ 1", "γ 3"]
    assert engines.seeds == (0, 1, 2)  # or the arms would draw the same numbers
    assert result["power"]["0.2"] == 1.0
    assert "Power: a bug that turns" in output
    assert "| γ 3 | " in (tmp_path / "s" / "sampling.md").read_text()
    assert run()[0] == 0
    assert len(engines.seeds) == 3  # everything was there


@pytest.mark.slow
def test_sharpened_arm_is_found(engines: type[GammaEngine], run: Any) -> None:
    engines.by_gamma = {3: Settings(sharpen=0.3)}
    status, result, output = run()
    assert status == 1
    assert {row["arm"]: row["differs"] for row in result["comparisons"]} == {
        "baseline again": False,
        "γ 1": False,
        "γ 3": True,
    }
    assert "another distribution" in output


@pytest.mark.slow
def test_engine_that_dies_keeps_the_other_arms(engines: type[GammaEngine], run: Any) -> None:
    engines.by_gamma = {3: Settings(die_after=2)}
    status, _, output = run()
    assert status == 2
    assert "got signal 9: out of memory" in output
    engines.by_gamma = {}
    assert run()[0] == 0
    assert engines.seeds == (0, 1, 2, 2)


def test_endpoint_that_dies_is_named(prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MockEngine(Settings()) as ours, MockEngine(Settings(die_after=2)) as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", f"3={theirs.url}"]
        size = ["--num-prompts", "3", "--completions", "40", "--batch", "20", "--tokens", "4"]
        files = ["--prompts", str(prompts_file), "--out", str(tmp_path / "out")]
        assert sampling.main(["--model", "fake", "--draft", "d", *urls, *size, *files]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sampling.py: error: γ 3: request: ")
    assert line.endswith("; the same command continues with what is missing")


@pytest.mark.parametrize(
    ("plain", "drafting", "complaint"),
    [
        (Settings(), Settings(), "γ 3: expected drafts, got none counted; is the drafter served?"),
        (Settings(gamma=3, drafts_per_answer=1), Settings(), "baseline: expected plain decoding, got drafts counted"),
        (Settings(), Settings(gamma=2, drafts_per_answer=1), "γ 3: expected drafts of 3 tokens, got 2 by its counters"),
    ],
)
def test_endpoints_draft_what_they_are_given_as(
    plain: Settings,
    drafting: Settings,
    complaint: str,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two plain servers were found to sample alike, and speculation sound."""
    size = ["--num-prompts", "1", "--completions", "20", "--tokens", "2", "--out", str(tmp_path / "s")]
    with MockEngine(plain) as ours, MockEngine(drafting) as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", f"3={theirs.url}", "--model", "fake", "--draft", "d"]
        assert sampling.main([*urls, "--prompts", str(prompts_file), *size]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "s" / "sampling.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gammas", "9"], "--gammas: expected at most 7, the drafter's block − 1, got 9"),
        (["--num-prompts", "15"], "--num-prompts: expected at most 14, got 15"),
        (["--temperature", "0"], "greedy parity: bench/certify.py"),
        (["--completions", "3"], "--completions: expected at least 20, got 3"),
        (["--level", "1e-9"], "--level: expected at least 7.2e-06 with 4 prompts × 120 completions, got 1e-09"),
        (["--completions", "10000000"], "--level: expected at least"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    engines: type[GammaEngine], run: Any, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    try:
        status, _, output = run(*more)
    except SystemExit as error:
        status, output = int(str(error.code)), capsys.readouterr().err
    assert status == 2
    assert message in output
    assert engines.seeds == ()


@pytest.mark.parametrize(
    ("more", "gammas"), [([], [1, 3, 7]), (["--quick"], [7]), (["--quick", "--gammas", "2,5"], [2, 5])]
)
def test_gammas_by_default(more: list[str], gammas: list[int]) -> None:
    argv = [*PAIR, "--prompts", "p", "--out", "o", *more]
    config = read_flags(sampling.SamplingConfig, argv, prog="sampling.py", description=None)
    assert config.list_gammas() == gammas


@pytest.mark.vllm
def test_real_engines_sound_and_biased(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plant: Callable[[str], None],
) -> None:
    monkeypatch.setattr(verdict, "TRIALS", 1)
    size = ["--num-prompts", "6", "--completions", "100", "--tokens", "5", "--gammas", "7", "--eager"]
    command = [*PAIR, "--prompts", str(TOY / "prompts.jsonl"), *size, "--level", "0.001"]
    assert sampling.main([*command, "--out", str(tmp_path / "s")]) == 0
    plant(BIAS)
    (tmp_path / "s" / "samples" / "γ-7.json").unlink()
    capsys.readouterr()
    assert sampling.main([*command, "--out", str(tmp_path / "s")]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["differs"] for row in result["comparisons"]] == [False, True]


@pytest.mark.slow
def test_sampling_from_python(
    engines: type[GammaEngine], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sampling.SamplingConfig(
        model=str(TOY / "teacher"),
        draft=str(TOY / "dflash"),
        prompts=prompts_file,
        num_prompts=2,
        completions=60,
        tokens=3,
        gammas=(3,),
        level=0.001,
        out=tmp_path / "s",
    )
    result = sampling.compare_distributions(config)
    assert [comparison.arm for comparison in result.comparisons] == ["baseline again", "γ 3"]
    assert all(len(comparison.p_values) == 2 for comparison in result.comparisons)
    assert read_result(tmp_path / "s" / "sampling.json", sampling.SamplingResult) == result
    assert capsys.readouterr().out == ""
