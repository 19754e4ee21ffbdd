"""The examples run as they are, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from warm import run_warm

ROOT = Path(__file__).resolve().parent.parent
# Of each, what its output must have.
EXAMPLES = {
    "grade_answers": ("reward 1.00  passed", "reward 0.33  failed", "timeout", "died"),
    "compact_checkpoint": ("160 of 640 blocks", "is the masked base"),
    "compare_engines": ("0 of 16 prompts differ",),
    "serve_and_ask": ("def fibonacci(n):", "tokens per step"),
}
WITHOUT_ENGINE = {"compact_checkpoint", "grade_answers"}


def list_examples() -> list[object]:
    """One case for each, those that start an engine marked so."""
    marks = {name: () if name in WITHOUT_ENGINE else (pytest.mark.vllm,) for name in EXAMPLES}
    return [pytest.param(name, marks=marks[name], id=name) for name in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_examples())
def test_example_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"examples/{name}.py"
    if name in WITHOUT_ENGINE:
        done = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    else:
        monkeypatch.chdir(ROOT)
        done = run_warm(program, timeout=600, engines=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in EXAMPLES[name]:
        assert expected in done.stdout


@pytest.mark.slow
def test_one_argument_too_few_is_said() -> None:
    program = [sys.executable, "examples/serve_and_ask.py", "tests/toy/teacher"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode
    (line,) = done.stderr.splitlines()
    assert line.endswith("expected MODEL and DRAFTER, or neither, got 1 arguments")


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
