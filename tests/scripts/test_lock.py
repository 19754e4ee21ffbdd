"""scripts/lock.sh with a resolver that is none: the lists are written anew together, or stay as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "lock.sh"
# Says what it resolves, which is half of it, and may end there.
UV = """#!/bin/bash
while [ $# -gt 0 ]; do case $1 in -o) out=$2; shift ;; *.in) name=$1 ;; esac; shift; done
echo "one==1" >"$out"
[ "$name" = "$FAILS" ] && exit 1
echo "$name==2" >>"$out"
"""


def lock(folder: Path, fails: str) -> tuple[int, dict[str, str]]:
    """Run it; its exit status, and what is in the folder of lists."""
    lists = folder / "scripts" / "requirements"
    shutil.copytree(SCRIPT.parent / "requirements", lists)
    (lists / "uv.lock").unlink()  # uv itself
    for path in lists.glob("*.lock"):
        path.write_text("old==1\n")
    kept = {path.name for path in lists.iterdir() if path.suffix != ".lock"}
    shutil.copy(SCRIPT, folder / "scripts")
    (folder / "bin").mkdir()
    for name, text in (("uv", UV), ("npm", "#!/bin/sh\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAILS": fails}
    done = subprocess.run(["bash", folder / "scripts" / "lock.sh"], env=environment, capture_output=True, check=False)
    found = {path.name: path.read_text() for path in lists.iterdir() if path.name not in kept}
    return done.returncode, found


@pytest.mark.parametrize("fails", ["cpu.in", "train.in", "ray.in"])
def test_lists_stay_as_they_are_where_one_is_not_resolved(fails: str, tmp_path: Path) -> None:
    status, found = lock(tmp_path, fails)
    assert status == 1
    assert set(found.values()) == {"old==1\n"}


def test_every_list_is_written_anew(tmp_path: Path) -> None:
    status, found = lock(tmp_path, "")
    assert status == 0
    names = [path.name for path in (SCRIPT.parent / "requirements").glob("*.in")]
    assert found == {name.replace(".in", ".lock"): f"one==1\n{name}==2\n" for name in names} | {
        "ray.lock": "ray.in==2\n"
    }, "without what cpu.lock has, and nothing beside them"
