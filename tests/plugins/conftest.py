"""Models run in a process of their own, once for equal arguments, for all tests that ask."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).resolve().parent.parent / "toy"
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
        probe = Path(__file__).with_name("model_probe.py")
        command = [sys.executable, str(probe), str(model), str(prompts_file), settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report | {"log": done.stdout + done.stderr}

    return lambda model, **settings: run(model, json.dumps(settings, sort_keys=True))
