"""What is learnt for proposals, and their benchmark, on a small random LLaDA: all tokens are the reference's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from tiny_llada import write_llada

from laguna_serve.bench.diffusion.arms import find_learnt
from laguna_serve.bench.diffusion.run import (
    FEWER_BITS,
    DiffusionConfig,
    choose_prompts,
    count_differing,
    main,
    measure_proposals,
    render_text,
)
from laguna_serve.bench.exactness import __main__ as exactness
from laguna_serve.plugins.diffusion.calibration import name_prompt
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server import options
from laguna_serve.plugins.diffusion.server.loading import load_tokenizer
from laguna_serve.plugins.diffusion.server.options import DRAFT_WEIGHTS
from laguna_serve.plugins.diffusion.speculation import Decoder
from laguna_serve.scripts.training.diffusion.calibrate import CalibrateConfig, learn
from laguna_serve.serving.kit.flags import FlagError

TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = TOY / "prompts.jsonl"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> CalibrateConfig:
    """A pair, and what was learnt about it."""
    folder = tmp_path_factory.mktemp("pair")
    config = CalibrateConfig(
        model=write_llada(folder / "model"),
        draft=write_llada(folder / "draft", error=0.02),
        prompts=PROMPTS,
        first=4,
        num_prompts=2,
        canvas=32,
        block=16,
        steps=20,
        out=folder / "proposals",
    )
    result = learn(config)
    assert result.examples
    assert set(result.nodes) == {"target", "draft", "corrected"}
    assert result.cost == 1
    return config


def bench(learnt: CalibrateConfig, out: Path) -> DiffusionConfig:
    return DiffusionConfig(
        model=learnt.model,
        draft=learnt.draft,
        proposals=learnt.out,
        prompts=PROMPTS,
        num_prompts=4,
        concurrency=(1, 2),
        canvas=32,
        block=16,
        out=out,
    )


def test_every_proposer_comes_to_the_references_tokens(learnt: CalibrateConfig, tmp_path: Path) -> None:
    result = measure_proposals(bench(learnt, tmp_path))
    assert count_differing(result) == 0
    names = [point.proposer for point in result.points if point.concurrency == 2]
    assert {"chain", "graph", "order", "union", "draft", "draft, gated", "draft, corrected"} <= set(names)
    for point in result.points:
        assert sum(steps for steps, _ in point.counts) == 4 * 32
        assert point.steps_per_pass >= 1
        assert point.steps_per_pass_ci95 is point.speedup_ci95 is None  # of two or four rounds
    plain = next(at for at in result.references if (at.schedule, at.cache) == ("1", "none"))
    assert plain.agreement == 1
    assert len(result.references) == 9
    assert (tmp_path / "draft_cost.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "diffusion.md").read_text()
    assert render_text(result) in text
    assert "(– no interval: it needs 8 of them at least)" in text
    assert json.loads((tmp_path / "diffusion.json").read_text())["schema"] == "laguna_serve.diffusion_proposals/1"


def test_prompts_that_were_learnt_from_are_not_measured(learnt: CalibrateConfig, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[5:12]))
    with pytest.raises(FlagError, match=r"expected at most 6, those that nothing was learnt from, got 7;"):
        measure_proposals(replace(bench(learnt, tmp_path), prompts=few, num_prompts=7))
    with pytest.raises(FlagError, match="expected at least 4, two rounds, got 2"):
        replace(bench(learnt, tmp_path), num_prompts=2)


def test_bits_that_no_draft_can_have_are_refused(
    learnt: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FlagError, match="--draft-weights: expected some of fp8, int8, int4, got int2"):
        replace(bench(learnt, tmp_path), draft_weights=("fp8", "int2"))
    with pytest.raises(FlagError, match="--draft-weights: expected each once, got fp8, fp8"):
        replace(bench(learnt, tmp_path), draft_weights=("fp8", "fp8"))
    assert DRAFT_WEIGHTS[1:] == FEWER_BITS
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(DiffusionError, match="expected an environment with torchao"):
        measure_proposals(replace(bench(learnt, tmp_path / "none"), draft_weights=("fp8",)))
    assert not (tmp_path / "none").exists(), "refused before anything was measured"
    with pytest.raises(FlagError, match="--draft-weights: expected --draft beside it"):
        replace(bench(learnt, tmp_path), draft=None, draft_weights=("fp8",))


@pytest.mark.parametrize(
    ("number", "learnt", "chosen"), [(2, "cd", "ab"), (2, "ab", "cd"), (3, "bc", "ade"), (9, "", "abcdef")]
)
def test_prompts_are_taken_that_nothing_was_learnt_from(number: int, learnt: str, chosen: str) -> None:
    assert choose_prompts("abcdef", number, [text in learnt for text in "abcdef"]) == [*chosen]


def test_what_was_learnt_from_is_known_in_another_file(tmp_path: Path) -> None:
    """It was known by its lines: in a file of another order, training prompts were measured as held-out ones."""
    tokenizer = load_tokenizer(TOY / "llada")
    texts = ["def a():\n", "def b():\n", "def c():\n"]
    noted: dict[str, object] = {"first": 0, "prompts": 1}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(noted))
    assert find_learnt(tmp_path, TOY / "llada", texts) == [True, False, False]
    path.write_text(json.dumps(noted | {"learnt": [name_prompt(tokenizer(texts[2])["input_ids"])]}))
    assert find_learnt(tmp_path, TOY / "llada", texts) == [False, False, True]


def test_too_few_prompts_that_nothing_was_learnt_from_are_refused() -> None:
    with pytest.raises(FlagError, match=r"expected at most 2, those that nothing was learnt from, got 3; give"):
        choose_prompts("abcdef", 3, [True] * 4 + [False] * 2)


def test_without_what_was_learnt_it_says_what_to_run(
    learnt: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(learnt.model), "--proposals", str(tmp_path), "--prompts", str(PROMPTS)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    assert "expected what scripts/training/diffusion/calibrate.py writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "fast"}, "schedule: expected tokens a step or a threshold, got 'fast'"),
        ({"cache": "all"}, "cache: expected none, prefix, dual, got 'all'"),
        ({"canvas": 256}, "--canvas: expected fewer than 256, got 256"),
        ({"first": 100_000}, "expected more than 100000 prompts"),
    ],
)
def test_bad_input_is_refused(learnt: CalibrateConfig, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DiffusionError, match=message):
        learn(replace(learnt, **wrong))  # type: ignore[arg-type]


def test_the_line_for_programs_counts_rounds(
    learnt: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(learnt.model), "--proposals", str(learnt.out), "--prompts", str(PROMPTS)]
    given += ["--num-prompts", "2", "--concurrency", "1", "--canvas", "16", "--block", "16"]
    assert main([*given, "--out", str(tmp_path), "--json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(point["rounds"], point["counts"]) for point in line["points"]] == [(2, 2)] * 4


def check_exactness(learnt: CalibrateConfig, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    flags = ["--model", str(learnt.model), "--draft", str(learnt.draft), "--proposals", str(learnt.out)]
    flags += ["--prompts", str(PROMPTS), "--num-prompts", "3", "--prompt-tokens", "6", "--caches", "dual"]
    status = exactness.main([*flags, "--concurrency", "2", "--out", str(out), *more])
    path = out / "exactness.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


def test_exactness_of_every_reference_and_its_resumption(
    learnt: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temperatures = ("--temperatures", "0,0.7", "--proposers", "chain,draft")
    status, result = check_exactness(learnt, tmp_path / "out", *temperatures)
    assert status == 0
    modes = {(point["schedule"], point["cache"], point["temperature"]) for point in result["points"]}
    assert modes == {(schedule, "dual", t) for schedule in ("1", "2", "0.9") for t in (0.0, 0.7)}
    assert all(point["differing"] == point["slower"] == 0 for point in result["points"])
    assert all(point["passes"] <= point["steps"] for point in result["points"])
    # What is there is not decoded again.
    monkeypatch.setattr(Decoder, "decode", lambda *_: pytest.fail("decoded"))
    assert check_exactness(learnt, tmp_path / "out", *temperatures) == (0, result | {"environment": ANY})
    assert check_exactness(learnt, tmp_path / "out", "--num-prompts", "2")[0] == 2
    assert "expected the parts of this measurement" in capsys.readouterr().err


def test_exactness_finds_a_wrong_token_and_a_pass_too_many(
    learnt: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = Decoder.decode

    def decode_wrongly(self: Decoder, canvases: Any) -> Any:
        runs = decode(self, canvases)
        if self.speculation is not None:
            runs[0].state = (runs[0].state[0] + 1, *runs[0].state[1:])
            runs[0].passes += 100
        return runs

    monkeypatch.setattr(Decoder, "decode", decode_wrongly)
    status, result = check_exactness(learnt, tmp_path / "out", "--proposers", "chain", "--schedules", "1")
    assert status == 1
    (point,) = result["points"]
    assert (point["differing"], point["slower"]) == (2, 2)  # the first of each pass of two
    assert "2 of 3" in capsys.readouterr().out
    assert check_exactness(learnt, tmp_path / "other", "--proposers", "oracle")[0] == 2
    assert "--proposers: expected some of chain, graph" in capsys.readouterr().err
