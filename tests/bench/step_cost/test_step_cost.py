"""bench/step_cost: what cannot be measured is refused before an engine starts, and one that dies is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from laguna_serve.bench.step_cost import engine as engine_module
from laguna_serve.bench.step_cost import run
from laguna_serve.bench.step_cost.engine import StepEngine, open_engine
from laguna_serve.serving.chat.vendor_defaults import NO_CONTRACT
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import Launch

TOY = Path(__file__).resolve().parents[2] / "toy"
PROBE = """
import os, sys
print(sys.argv[1] + "null", flush=True)
sys.stdin.readline()
END
"""


@pytest.fixture
def open_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepEngine]:
    """Open a probe that ends at its first request, as the file `end.py` says."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    launch = Launch(["python", "-m", "server"], environment, "", None, NO_CONTRACT, ())
    monkeypatch.setattr(engine_module, "plan_launch", lambda _config: launch)
    monkeypatch.setattr(engine_module, "PROBE", "probe_that_ends")

    def opened(end: str) -> object:
        (tmp_path / "probe_that_ends.py").write_text(PROBE.replace("END", end))
        return open_engine(EngineConfig(model="m"), tmp_path / "engine.log")

    return opened


@pytest.mark.parametrize(
    ("end", "reason"),
    [("os.kill(os.getpid(), 9)", "signal 9"), ("raise ValueError('no such layer')", "ValueError: no such layer")],
)
def test_an_engine_that_dies_is_said_with_its_reason(open_probe, end: str, reason: str) -> None:
    """Also where it was gone before it was asked: a broken pipe ended the command without a word."""
    with open_probe(end) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=f"expected an answer, got its end: .*{reason}.*engine.log"):
                engine.decode("a", 16, 0.0, apart=False)


def test_what_cannot_be_measured_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "open_engine", start)
    pair = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash"), "--out", str(tmp_path / "out")]
    command = [*pair, "--prompts", str(TOY / "prompts.jsonl"), "--quick"]
    for more, line in (
        (["--max-tokens", "2048"], "tokens of an answer: expected fewer than the 2048 tokens"),
        (["--gamma", "99"], "gamma: expected 1 to 7"),
        (["--draft", str(TOY / "dense")], "drafter"),
    ):
        assert run.main([*command, *more]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
