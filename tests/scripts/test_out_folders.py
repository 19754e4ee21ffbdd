"""A file in the place of --out is refused in one line before anything is measured, by every command with a folder."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from laguna_serve.serving.kit.run_dir import hold_folder

TOY = Path(__file__).resolve().parents[1] / "toy"
NOBODY = ["--base-url", "http://127.0.0.1:1"]
REFERENCES = ["--model", str(TOY / "llada"), "--judge", str(TOY / "teacher"), "--prompts", str(TOY / "prompts.jsonl")]
COMMANDS = {
    "evals.code_tasks": NOBODY,
    "evals.loss": [*NOBODY, "--text", str(TOY / "README.md")],
    "evals.pruning_loss": ["--model", str(TOY / "teacher")],
    "evals.references": [*REFERENCES, "--other", "dual=--cache dual"],
    "evals.invariance": ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")],
    "scripts.score_experts": [str(TOY / "teacher")],
    "scripts.pruning_curve": [str(TOY / "teacher"), "--masks", str(TOY / "masks")],
    "scripts.grpo": ["--model", str(TOY / "teacher")],
    "scripts.training.diffusion.toy": [],
    "scripts.training.diffusion.prune": [str(TOY / "llada")],
    "scripts.training.diffusion.distil": [str(TOY / "llada"), str(TOY / "llada-draft")],
    "scripts.training.diffusion.calibrate": [str(TOY / "llada"), "--prompts", str(TOY / "prompts.jsonl")],
}
# Those that import torch before they look.
SLOW = "diffusion"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if SLOW in name else []) for name in COMMANDS]
)
def test_a_file_in_the_place_of_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    module = importlib.import_module(f"laguna_serve.{name}")
    for place in ("file", "file/below"):
        assert module.main([*COMMANDS[name], "--out", str(tmp_path / place)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"expected a folder, got the file {tmp_path / 'file'}; choose another" in error
    assert (tmp_path / "file").read_text() == "mine"


# Those whose folders the same command goes on with.
KEEPING = ("evals.code_tasks", "evals.loss", "evals.pruning_loss", "evals.invariance", "evals.references")
ALONE = {
    "scripts.score_experts": [str(TOY / "teacher"), "--score", "magnitude"],
    "scripts.distill_dense": [str(TOY / "teacher"), "--text", str(TOY / "README.md"), "--work", "WORK"],
    "scripts.training.drafter.command": [str(TOY / "teacher"), "--prompts", str(TOY / "prompts.jsonl")],
    "scripts.training.dense.experiments.__main__": [str(TOY / "teacher")],
    "scripts.training.diffusion.distil": [str(TOY / "llada"), str(TOY / "llada-draft")],
    "scripts.training.diffusion.toy": ["--work", "WORK"],
    "scripts.frontier.__main__": ["--model", str(TOY / "teacher")],
    "scripts.dante.cache": [str(TOY / "prompts.jsonl"), "--endpoint", "http://127.0.0.1:1"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KEEPING else [pytest.mark.slow]) for name in (*KEEPING, *ALONE)]
)
def test_a_second_run_is_kept_out_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of them wrote to the same states or journal, without a word."""
    out = tmp_path / "out"
    flags = [str(tmp_path / "work") if flag == "WORK" else flag for flag in (COMMANDS | ALONE)[name]]
    module = importlib.import_module(f"laguna_serve.{name}")
    with hold_folder(out):
        assert module.main([*flags, "--out", str(out)]) == 2
        assert list(out.iterdir()) == []
    error = capsys.readouterr().err.splitlines()[-1]
    who = f"another run at it (process {os.getpid()})"
    assert error.endswith(f"{out}: expected to write alone, got {who}; wait for its end")
