"""Models run in a process of their own, once for equal arguments, for all tests that ask."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from probes import run_program
from warm import run_warm

TOY = Path(__file__).resolve().parent.parent / "toy"
MASKS = TOY / "masks"
PROMPTS = 64


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = (TOY / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:PROMPTS]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_model(prompts_file: Path) -> Any:
    """(model, **settings) → what model_probe.py reports of it, run once for equal arguments."""

    @functools.cache
    def run(model: Path, settings: str) -> dict[str, Any]:
        done = run_program("model_probe.py", str(model), str(prompts_file), settings)
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report | {"log": done.stdout + done.stderr}

    return lambda model, **settings: run(model, json.dumps(settings, sort_keys=True))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(percent, *flags) → the folder that `laguna compact` makes of the toy teacher."""
    root = tmp_path_factory.mktemp("pruned")

    @functools.cache
    def make(percent: int, *flags: str) -> Path:
        out = root / f"{percent}{''.join(flags)}"
        command = ["compact", str(TOY / "teacher"), "--keep-mask", str(MASKS / f"group_keep_mask_{percent}pct.npy")]
        command += ["--group-indices", str(MASKS / "group_indices_importance_sorted.npy"), "--out", str(out), *flags]
        done = run_warm("laguna_serve.serving.cli", *command)
        assert done.returncode == 0, done.stderr
        return out

    return make
