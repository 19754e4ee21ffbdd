"""scripts/requirements/install.sh: uv looks where pip is configured to look, and pip is there where uv fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "scripts" / "requirements"
# A Python whose pip installs uv by making a program that does as the test says; both note what they are called with.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "pip ${{*:2}}" >>{folder}/calls
case "$*" in
  *"config list") printf '%s' "$PIP_CONFIG" ;;
  *uv.lock) [ -n "$UV_DOES" ] || exit 1
    printf '#!/usr/bin/env bash\\necho "uv $*" >>{folder}/calls\\n%s\\n' "$UV_DOES" >{folder}/bin/uv
    chmod +x {folder}/bin/uv ;;
  *) exit "$PIP_STATUS" ;;
esac
"""
CONFIG = """:env:.find-links='/wheels /more'
global.extra-index-url='file:///one/simple https://two/simple'
global.find-links='/system'
global.index-url='https://user:word@index/simple?a=b'
install.index-url='https://not-this/simple'
global.timeout='60'
"""


def install(folder: Path, *, uv: str = "exit 0", config: str = "", pip_status: int = 0) -> tuple[int, list[str]]:
    """Its exit status, and what was called."""
    (folder / "bin").mkdir()
    requirements = shutil.copytree(SOURCE, folder / "requirements")
    python = folder / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(folder=folder))
    python.chmod(0o755)
    command = ["bash", str(requirements / "install.sh"), str(python), "some.lock"]
    environment = {"PATH": "/usr/bin:/bin", "UV_DOES": uv, "PIP_CONFIG": config, "PIP_STATUS": str(pip_status)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_uv_looks_where_pip_does(tmp_path: Path) -> None:
    status, calls = install(tmp_path, config=CONFIG)
    assert (status, calls[-1].split()[:2]) == (0, ["uv", "pip"])
    assert calls[-1].endswith(
        "--find-links /wheels --find-links /more --index file:///one/simple --index https://two/simple "
        "--find-links /system --default-index https://user:word@index/simple?a=b -r some.lock"
    )


@pytest.mark.parametrize("uv", ["", "exit 2"], ids=["no uv", "uv fails"])
@pytest.mark.parametrize("pip_status", [0, 1])
def test_pip_installs_what_uv_does_not(tmp_path: Path, uv: str, pip_status: int) -> None:
    status, calls = install(tmp_path, uv=uv, pip_status=pip_status)
    assert status == pip_status
    assert calls[-1].startswith("pip pip --disable-pip-version-check install")
    assert calls[-1].endswith("-r some.lock")


def test_only_uv_is_asked_where_it_succeeds(tmp_path: Path) -> None:
    calls = install(tmp_path)[1]
    assert [call.split()[0] for call in calls if call.endswith(" some.lock")] == ["uv"]
