"""Every shell script says what it does, and takes no argument that it does not know; neither runs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("*.sh"))
PATIENCE_S = 30


def run(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a folder where it is alone, so that it fails where it begins its work."""
    (folder / "scripts").mkdir()
    shutil.copy(script, folder / "scripts")
    command = ["bash", f"scripts/{script.name}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_the_scripts_head(script: Path, flag: str, tmp_path: Path) -> None:
    done = run(script, tmp_path, flag)
    head = script.read_text(encoding="utf-8").split("\nset -")[0].splitlines()[1:]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [line[2:] for line in head]
    assert not done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["scripts", script.name]


@pytest.mark.parametrize("name", ["bootstrap", "deployment", "docs", "lint", "wheel"])
def test_what_takes_no_arguments_refuses_them(name: str, tmp_path: Path) -> None:
    script = next(path for path in SCRIPTS if path.stem == name)
    done = run(script, tmp_path, "--dry-run", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: arguments: expected" in done.stderr
    assert "got '--dry-run x'; see --help" in done.stderr
