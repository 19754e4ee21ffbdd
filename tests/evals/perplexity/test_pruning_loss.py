"""pruning_loss.py on mock engines and the tools: the curve, its verdict, resume; and the tools for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mock_engine import MockEngine, scoring

from laguna_serve.bench.arms import arms
from laguna_serve.evals import pruning_loss
from laguna_serve.evals.perplexity import pruning_arms
from laguna_serve.evals.perplexity.pruning_arms import Plan, ToolError, list_plans, run_script
from laguna_serve.serving.engine import EngineConfig, EngineError

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
TEXT = "def add(a, b):\n    return a + b\n"
Run = Callable[..., tuple[int, dict[str, Any], str]]


class MockLossEngine:
    """Takes the launcher's place.

    A token costs its id ÷ 100 nats, and more by what is in `added` under a part of the checkpoint's path; `dies` names
    the model whose engine is gone after two rows.
    """

    added: ClassVar[dict[str, float]] = {}
    dies: ClassVar[str] = "none"
    started: ClassVar[list[str]] = []

    def __init__(self, config: EngineConfig, **_: Any) -> None:
        self.command, self.model_name = ["vllm"], "fake"
        self.name = Path(config.model).parent.name
        more = sum(nats for part, nats in self.added.items() if part in self.name)
        self._dies = self.dies == self.name
        losses = {token: token / 100 + more for token in range(256)}
        self._fake = MockEngine(scoring(max_model_len=500, losses=losses, die_after=2 if self._dies else None))

    def __enter__(self) -> MockLossEngine:
        self.started.append(self.name)
        self._fake.__enter__()
        self.base_url = self._fake.url
        return self

    def __exit__(self, *_: Any) -> None:
        self._fake.__exit__(None, None, None)

    def check(self) -> None:
        if self._dies:
            raise EngineError("engine fake: expected it to run, got signal 9: out of memory")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[MockLossEngine]:
    made = type("Made", (MockLossEngine,), {"added": {"ranked-10": 0.01, "ranked-20": 0.02, "random": 0.05}})
    made.started = []
    monkeypatch.setattr(arms, "Engine", made)
    return made


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that nobody reads need not be made."""

    def make(_module: str, *arguments: str | Path) -> dict[str, Any]:
        out = Path(arguments[-1])
        if out.suffix:
            out.write_bytes(b"")
        else:
            out.mkdir(exist_ok=True)
        return {}

    monkeypatch.setattr(pruning_arms, "run_script", make)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{TEXT}# {index}\n"}) + "\n" for index in range(12)))

    def run_curve(*more: str) -> tuple[int, dict[str, Any], str]:
        flags = ["--model", str(TOY / "teacher"), "--text", str(text), "--out", str(tmp_path / "p")]
        try:
            status = pruning_loss.main([*flags, "--shares", "0.2,0.1", "--seeds", "2", *more])
        except SystemExit as error:
            status = int(str(error.code))
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, captured.out + captured.err

    return run_curve


@pytest.mark.slow
@pytest.mark.usefixtures("no_tools")
def test_curve_is_what_the_engines_say(engines: type[MockLossEngine], run: Run, tmp_path: Path) -> None:
    status, result, output = run()
    assert status == 0, output
    assert [point["share"] for point in result["points"]] == [0.1, 0.2]
    for point, added in zip(result["points"], (0.01, 0.02), strict=True):
        delta = point["ranked_delta"]
        assert delta["nats_per_token"] == pytest.approx(added)
        assert delta["ci95"] == pytest.approx([added, added])  # paired: every token costs that much more
        assert (delta["drawn"], delta["units"]) == ("documents", 12)
        assert point["random_delta"] == pytest.approx(0.05)
        assert len(point["random"]) == 2
    assert result["data"]["documents"] == 12
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        *("pruning_loss.json", "pruning_loss.md", "pruning_loss.png", "models")
    }
    assert not list((tmp_path / "p").rglob("checkpoint"))
    started = list(engines.started)
    status, again, _ = run()
    assert (status, again["points"], again["data"]) == (0, result["points"], result["data"])
    assert engines.started == started  # everything was there
    assert run("--seeds", "3")[0] == 0
    assert engines.started[len(started) :] == ["random-10pct-seed2", "random-20pct-seed2"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_tools")
def test_ranked_masks_that_are_no_better_fall_short(engines: type[MockLossEngine], run: Run) -> None:
    engines.added = {"ranked-20": 0.05, "ranked-10": 0.01, "random": 0.05}
    status, result, _ = run()
    assert status == 1
    assert [point["ranked_is_better"] for point in result["points"]] == [True, False]


@pytest.mark.slow
@pytest.mark.usefixtures("no_tools")
def test_engine_that_dies_keeps_what_was_measured(engines: type[MockLossEngine], run: Run) -> None:
    engines.dies = "ranked-20pct"
    status, _, output = run()
    assert status == 2
    assert "got signal 9: out of memory" in output
    assert "Traceback" not in output
    engines.dies = "none"
    assert run()[0] == 0
    assert engines.started.count("ranked-20pct") == 2
    assert engines.started.count("ranked-10pct") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_tools")
def test_another_measurements_folder_is_refused(engines: type[MockLossEngine], run: Run) -> None:
    assert run()[0] == 0
    engines.started.clear()
    status, _, output = run("--rows", "3")
    assert status == 2
    assert "choose another --out" in output
    assert engines.started == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--masks", str(TOY)], "expected group_indices_importance_sorted.npy in it, got none"),
        (["--model", "nowhere/at-all"], "expected a folder or a cached hub id"),
        (["--shares", "0.1,1"], "expected shares between 0 and 1 like 0.1,0.2, got '0.1,1'"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--text", "nowhere.txt"], "nowhere.txt: expected a text file"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    engines: type[MockLossEngine], run: Run, more: list[str], message: str
) -> None:
    status, _, output = run(*more)
    assert status == 2
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert engines.started == []


@pytest.mark.slow
def test_tool_that_fails_is_quoted_in_one_line(tmp_path: Path) -> None:
    said = r"toy_text\.py: error: --out .*: expected a file, got a folder; name a file in it"
    quoted = rf"^scripts.toy_text: expected success, got: {said}$"
    with pytest.raises(ToolError, match=quoted):
        run_script("scripts.toy_text", "--out", tmp_path)


@pytest.mark.slow
def test_tools_make_the_models(
    engines: type[MockLossEngine], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pruned: dict[str, int] = {}
    real = pruning_arms.run_script

    def watch(module: str, *arguments: str | Path) -> dict[str, Any]:
        result = real(module, *arguments)
        if module == "serving.cli":
            pruned[Path(arguments[-1]).parent.name] = result["blocks_pruned"]
        return result

    monkeypatch.setattr(pruning_arms, "run_script", watch)
    assert run("--shares", "0.2", "--seeds", "1")[0] == 0
    assert pruned == {"ranked-20pct": 128, "random-20pct-seed0": 128}
    keep = np.load(tmp_path / "p" / "models" / "group_keep_mask_20pct.npy")
    assert (keep.dtype, int((~keep).sum()), keep.size) == (np.dtype(bool), 128, 640)
    assert engines.started == ["toy", "ranked-20pct", "random-20pct-seed0"]


def test_plans_begin_with_what_a_curve_needs_most() -> None:
    plans = list_plans((0.1, 0.125), 1)
    names = ["unpruned", "ranked-10pct", "ranked-12.5pct", "random-10pct-seed0", "random-12.5pct-seed0"]
    assert [plan.name for plan in plans] == names
    assert plans[0] == Plan("unpruned")
