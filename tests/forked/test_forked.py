"""Forked workers: every test is reported once, and nothing is lost where one ends before its time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SHARED = """
import os, time
import pytest

@pytest.fixture(scope="session")
def shared():
    with open("log", "a") as log:
        log.write(f"up {os.getpid()}\\n")
    yield os.getpid()
    with open("log", "a") as log:
        log.write(f"down {os.getpid()}\\n")
"""
TESTS = """
import pytest

FILE_LEVEL = []

@pytest.mark.parametrize("number", range(3))
def test_of_one_file(shared, number):
    FILE_LEVEL.append(shared)
    assert set(FILE_LEVEL) == {shared}
    assert len(FILE_LEVEL) == number + 1
"""
OTHERS = """
import pytest

def test_skipped():
    pytest.skip("not here")

def test_failing(shared):
    print("said by", "the test")
    assert shared == -1

@pytest.fixture
def bad_end():
    yield
    raise OSError("at its end")

def test_bad_end(bad_end):
    pass
"""


def run_pytest(folder: Path, *flags: str, **files: str) -> tuple[int, str]:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "forked", "-p", "no:cacheprovider", "--workers", "2", *flags]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_each_test_is_reported_and_the_session_ends_in_each_process(tmp_path: Path) -> None:
    files = {"conftest": SHARED, "test_others": OTHERS, **{f"test_{i}": TESTS for i in range(8)}}
    status, said = run_pytest(tmp_path, "-ra", **files)
    assert status == 1
    assert re.search(r"1 failed, 25 passed, 1 skipped, 1 error in", said), said
    assert said.count("said by the test") == 1
    assert said.count("OSError: at its end") >= 1
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    ups, downs = ({line.split()[1] for line in log if line.startswith(way)} for way in ("up", "down"))
    assert ups == downs
    assert len(log) == len(ups) + len(downs), "once in each process"


def test_process_that_ends_fails_its_test_and_the_run(tmp_path: Path) -> None:
    death = "import os\ndef test_before(): pass\ndef test_death(): os._exit(0)\ndef test_after(): pass\n"
    status, said = run_pytest(tmp_path, test_death=death)
    assert status == 1
    assert "FAILED" in said
    assert "test_death.py::test_death" in said
    assert "a worker ended" in said


def test_run_stops_at_the_first_failure_and_ends_what_is_running(tmp_path: Path) -> None:
    slow = "import time\ndef test_long(shared): time.sleep(600)\n"
    failing = "import time\ndef test_failing():\n    time.sleep(1)\n    raise OSError\n"
    status, said = run_pytest(tmp_path, "-x", conftest=SHARED, test_a=slow, test_b=failing)
    assert status == 1
    assert "stopping after 1 failures" in said
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["up", "down"]
