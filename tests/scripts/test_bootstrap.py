"""What scripts/bootstrap.sh says when something is missing: run in a copy, with mocks of what it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Answers as a Python that can make an environment, in which every pip install fails as the test says.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip"*) echo "{pip_says}" >&2; exit 1 ;;
  "--version") echo "Python 3.11.0" ;;
  *) exit 0 ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with nothing but what the script reads."""
    shutil.copytree(ROOT / "scripts" / "requirements", tmp_path / "scripts" / "requirements")
    shutil.copy(ROOT / "scripts" / "bootstrap.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def bootstrap(copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{copy / 'bin'}:{os.environ['PATH']}", "LAGUNA_STACK": "cpu", **environment}
    script = ["bash", str(copy / "scripts" / "bootstrap.sh")]
    return subprocess.run(script, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_unknown_stack(copy: Path) -> None:
    done = bootstrap(copy, LAGUNA_STACK="tpu")
    assert done.returncode == 2
    assert done.stderr == "bootstrap: LAGUNA_STACK: expected cpu or gpu, got 'tpu'\n"


def test_old_python(copy: Path) -> None:
    old = write_script(copy / "bin" / "old", "#!/usr/bin/env bash\nexit 1\n")
    done = bootstrap(copy, PYTHON=str(old))
    assert done.returncode == 2
    assert "Python: expected 3.11 or newer" in done.stderr
    assert "PYTHON=" in done.stderr


def test_full_disk(copy: Path) -> None:
    python = write_script(copy / "bin" / "python", FAKE_PYTHON.format(pip_says=""))
    write_script(copy / "bin" / "df", "#!/usr/bin/env bash\necho header; echo disk 1 1 1048576 1% /\n")
    done = bootstrap(copy, PYTHON=str(python))
    assert done.returncode == 2
    assert "disk: expected 5 GiB free" in done.stderr
    assert "got 1 GiB; make room" in done.stderr
    assert not (copy / ".venv").exists()


def test_no_torch_wheel(copy: Path) -> None:
    says = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    python = write_script(copy / "bin" / "python", FAKE_PYTHON.format(pip_says=says))
    done = bootstrap(copy, PYTHON=str(python))
    assert done.returncode == 2
    assert says in done.stderr
    assert "torch: no wheel of torch==2.13.0+cpu for Python 3.11.0" in done.stderr
    assert "PyTorch's own CPU wheel index offers it" in done.stderr
    assert not (copy / ".venv" / ".stamp").exists(), "the next run must try again"


def test_second_run_does_nothing(copy: Path) -> None:
    python = write_script(copy / "bin" / "python", FAKE_PYTHON.format(pip_says="").replace("exit 1", "exit 0"))
    assert bootstrap(copy, PYTHON=str(python)).returncode == 0
    again = bootstrap(copy, PYTHON="/nowhere")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
