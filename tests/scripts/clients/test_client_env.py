"""What scripts/client_env.sh says when something is missing: run in a copy, with a mock of Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Answers as a Python that can make an environment, in which pip ends as the test says.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv .venv-evals") mkdir -p .venv-evals/bin && cp "$0" .venv-evals/bin/python ;;
  *"pip"*) echo "$PIP_SAYS" >&2; exit "$PIP_STATUS" ;;
  *) exit 0 ;;
esac
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with nothing but what the script reads, and the mock."""
    shutil.copytree(ROOT / "scripts" / "requirements", tmp_path / "scripts" / "requirements")
    shutil.copy(ROOT / "scripts" / "client_env.sh", tmp_path / "scripts")
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHON": str(copy / "python"), "PIP_SAYS": "", "PIP_STATUS": "0", **environment}
    script = ["bash", str(copy / "scripts" / "client_env.sh"), "evals"]
    return subprocess.run(script, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_makes_it_once_and_again_for_another_lock(copy: Path) -> None:
    count = (copy / "scripts" / "requirements" / "evals.lock").read_text().count("\n")
    assert f"installing {count} locked packages" in make(copy).stderr
    assert (copy / ".venv-evals" / ".gitignore").read_text() == "*\n"
    again = make(copy, PIP_STATUS="1")
    assert (again.returncode, again.stderr) == (0, "")
    lock = copy / "scripts" / "requirements" / "evals.lock"
    lock.write_text(lock.read_text() + "one-more==1\n")
    assert f"installing {count + 1} locked packages" in make(copy).stderr


def test_failed_install_is_told_and_tried_again(copy: Path) -> None:
    done = make(copy, PIP_STATUS="1", PIP_SAYS="ERROR: No matching distribution found for lm-eval==0.4.13")
    assert done.returncode == 2
    assert "ERROR: No matching distribution found for lm-eval==0.4.13" in done.stderr
    assert "pip could not install scripts/requirements/evals.lock" in done.stderr
    assert "installing" in make(copy).stderr


def test_missing_python(copy: Path) -> None:
    done = make(copy, PYTHON=str(copy / "none"))
    assert done.returncode == 2
    assert "Python: expected 3.11 or newer" in done.stderr


def test_lock_is_of_the_pinned_releases_and_without_an_engine() -> None:
    lock = (ROOT / "scripts" / "requirements" / "evals.lock").read_text()
    assert {"lm-eval==0.4.13", "evalplus==0.3.1"} <= set(lock.split("\n"))
    assert not re.search(r"^(torch|vllm)\b", lock, re.MULTILINE)


def test_training_lies_over_the_engines_environment(copy: Path) -> None:
    """It is refused without one; its list is short, as that environment has torch and the rest."""
    script = ["bash", str(copy / "scripts" / "client_env.sh"), "train"]
    done = subprocess.run(script, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected .venv, which it is laid over, got none; run scripts/bootstrap.sh" in done.stderr
    lock = (ROOT / "scripts" / "requirements" / "train.lock").read_text().split()
    assert {line.partition("==")[0] for line in lock} == {"accelerate", "torchao", "trl"}
