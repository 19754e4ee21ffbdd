"""scripts/other_vllm.sh before it installs anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "other_vllm.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", ["", "0.33", "../x", "0.33.0; true"])
def test_what_is_no_release_is_refused(version: str) -> None:
    done = run(version)
    assert done.returncode == 2
    assert f"other_vllm: version: expected one like 0.33.0, got '{version}'" in done.stderr


def test_help_says_what_it_runs() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "tests/plugins and tests/serving/service" in done.stdout
