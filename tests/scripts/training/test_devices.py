"""A GPU that was asked for and is not there is one line: no traceback, and no work on the processor instead."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from laguna_serve.scripts.dante import ablate, train

TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = ["--prompts", str(TOY / "prompts.jsonl")]
LLADA = ["--model", str(TOY / "llada"), "--draft", str(TOY / "llada-draft")]
COMMANDS = {
    "scripts.dante.train": [str(TOY / "dense"), "--cache", "none"],
    "scripts.dante.ablate": [str(TOY / "dense"), "--cache", "none", "--held-out", "none", "--other", "none"],
    "scripts.training.diffusion.calibrate": [str(TOY / "llada"), *PROMPTS],
    "scripts.training.diffusion.distil": [str(TOY / "llada"), str(TOY / "llada-draft")],
    "scripts.score_experts": [str(TOY / "teacher")],
    "scripts.frontier.__main__": ["--model", str(TOY / "teacher")],
    "bench.diffusion.__main__": [*LLADA, "--proposals", str(TOY / "llada-proposals"), *PROMPTS],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_gpu_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (train, ablate):
        monkeypatch.setattr(module, "require_trainer", lambda: None)
    run = importlib.import_module(f"laguna_serve.{name}").main
    assert run([*COMMANDS[name], "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "--device: expected a GPU that torch can use, got none; leave it out for the CPU" in error
