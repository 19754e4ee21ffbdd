"""scripts/requirements/install.sh: uv looks where pip is configured to look, and pip is there where uv fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "scripts" / "requirements"
# A Python whose pip installs uv by making a program that does as the test says; both note what they are called with.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -) exec {python} - ;;
  *uv.lock) [ -n "$UV_DOES" ] || exit 1
    printf '#!/usr/bin/env bash\\n(echo "uv $*"; env) >>{folder}/calls\\n%s\\n' "$UV_DOES" >{folder}/bin/uv
    chmod +x {folder}/bin/uv ;;
  *) echo "pip $*" >>{folder}/calls; exit "$PIP_STATUS" ;;
esac
"""
CONFIG = """
[global]
index-url = https://user:word@global/simple
extra-index-url =
    file:///one/simple
    https://two/simple
find-links = /system
cert = /etc/own.pem
[install]
index-url = https://user:word@install/simple?a=b
[download]
index-url = https://not-this/simple
"""


def install(folder: Path, *, uv: str = "exit 0", pip_status: int = 0, **environment: str) -> tuple[int, list[str]]:
    """Its exit status, and what was called."""
    (folder / "bin").mkdir()
    requirements = shutil.copytree(SOURCE, folder / "requirements")
    python = folder / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(folder=folder, python=sys.executable))
    python.chmod(0o755)
    (folder / "pip.conf").write_text(CONFIG)
    command = ["bash", str(requirements / "install.sh"), str(python), "some.lock"]
    given = {"PATH": "/usr/bin:/bin", "UV_DOES": uv, "PIP_STATUS": str(pip_status), "HOME": str(folder)}
    given |= {"PIP_CONFIG_FILE": str(folder / "pip.conf"), **environment}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=60, check=False)
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_uv_looks_where_pip_does(tmp_path: Path) -> None:
    """The section of the command goes before the common one, and the environment before both."""
    status, calls = install(tmp_path, PIP_FIND_LINKS="/wheels /more", PIP_NO_INDEX="0")
    told = dict(line.split("=", 1) for line in calls[1:] if "=" in line)
    assert status == 0
    assert calls[0].endswith("-r some.lock")
    assert "word" not in calls[0]
    assert "--no-index" not in calls[0]
    assert told["UV_DEFAULT_INDEX"] == "https://user:word@install/simple?a=b"
    assert told["UV_INDEX"] == "file:///one/simple https://two/simple"
    assert told["UV_FIND_LINKS"] == "/wheels,/more"
    assert told["SSL_CERT_FILE"] == "/etc/own.pem"


def test_no_index_is_none_for_uv(tmp_path: Path) -> None:
    assert " --no-index " in install(tmp_path, PIP_NO_INDEX="1")[1][0]


@pytest.mark.parametrize("uv", ["", "exit 2"], ids=["no uv", "uv fails"])
@pytest.mark.parametrize("pip_status", [0, 1])
def test_pip_installs_what_uv_does_not(tmp_path: Path, uv: str, pip_status: int) -> None:
    status, calls = install(tmp_path, uv=uv, pip_status=pip_status)
    assert status == pip_status
    assert calls[-1].startswith("pip -m pip --disable-pip-version-check install")
    assert calls[-1].endswith("-r some.lock")


def test_only_uv_is_asked_where_it_succeeds(tmp_path: Path) -> None:
    calls = install(tmp_path)[1]
    assert [call.split()[0] for call in calls if call.endswith(" some.lock")] == ["uv"]
