"""Hostile programs behind every wall: nothing that they try succeeds, and nobody outside has a scratch.

They are started by root and by a user without privileges, on this system and in what a container leaves of it.
docs/threat-model.md names these tests.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from laguna_serve.evals.sandbox import find_obstacle
from laguna_serve.evals.sandbox.bubblewrap import is_installed
from laguna_serve.evals.sandbox.walls.landlock import find_version

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RUN = [sys.executable, str(HERE / "escape_run.py")]
AS_USER = [sys.executable, str(HERE / "as_user.py")]
# How an attempt is refused.
REFUSALS = {"PermissionError", "FileNotFoundError", "OSError"}
WAIT_S = 60
CASES = [
    *((user, walls) for user in ("itself", "ordinary") for walls in ("namespaces", "bubblewrap", "landlock")),
    ("itself", "landlock-1"),
    ("itself", "landlock-root"),
    # There no namespace can be made: what is left is chosen.
    ("container-root", "auto"),
    ("container-user", "auto"),
]
each_case = pytest.mark.parametrize(("user", "walls"), CASES, ids=[f"{user}-{walls}" for user, walls in CASES])


def make_command(user: str, *arguments: str) -> list[str]:
    """The runner's, as the user; tests of users whom this one cannot become are skipped."""
    if user == "itself":
        return [*RUN, *arguments]
    if os.getuid() != 0:
        pytest.skip("only root can run programs as another user; this one's own are tested")
    command = [*AS_USER, user]
    tried = subprocess.run([*command, sys.executable, "-c", "pass"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no user {user} here: {tried.stderr.strip().splitlines()[-1]}")
    return [*command, *RUN, *arguments]


@functools.cache
def attack(user: str, walls: str) -> dict[str, Any]:
    """What came of everything that is tried; once for each user and wall."""
    wanted = walls if walls in ("namespaces", "bubblewrap") else "landlock"
    if wanted == "landlock" and not find_version():
        pytest.skip("this kernel has no Landlock")
    if wanted == "bubblewrap" and not is_installed():
        pytest.skip("bubblewrap is not installed")
    if wanted == "namespaces" and find_obstacle() is not None:
        pytest.skip(f"no namespaces here: {find_obstacle()}")
    if wanted == "bubblewrap" and find_obstacle("bubblewrap") is not None:
        pytest.skip(f"no bubblewrap here: {find_obstacle('bubblewrap')}")
    run = subprocess.run(make_command(user, walls), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    assert (found["uid"] == os.getuid()) == (user == "itself" or user == "container-root")
    assert found["attempts"] is not None, found["said"]
    return found


def list_successes(found: dict[str, Any], kind: str) -> list[str]:
    """What a hostile program has got, or that could not be tried."""
    tried = {name: outcome for name, outcome in found["attempts"].items() if name.startswith(kind)}
    assert len(tried) >= 5, f"attempts on {kind}: expected them to be tried, got {sorted(tried)}"
    escaped = [f"{name}: {outcome}" for name, outcome in tried.items() if outcome not in REFUSALS]
    return escaped + [text for text in found["damage"] if text.startswith(kind)]


@pytest.mark.slow
@each_case
def test_files_are_out_of_reach(user: str, walls: str) -> None:
    assert list_successes(attack(user, walls), "files") == []


@pytest.mark.slow
@each_case
def test_processes_are_out_of_reach(user: str, walls: str) -> None:
    assert list_successes(attack(user, walls), "processes") == []


@pytest.mark.slow
@each_case
def test_network_is_out_of_reach(user: str, walls: str) -> None:
    assert list_successes(attack(user, walls), "network") == []


@pytest.mark.slow
@each_case
def test_kernel_objects_are_out_of_reach(user: str, walls: str) -> None:
    assert list_successes(attack(user, walls), "kernel") == []


@pytest.mark.slow
@each_case
def test_verdict_cannot_be_forged(user: str, walls: str) -> None:
    found = attack(user, walls)
    passed, tests_passed = found["forged"]
    assert not passed
    assert tests_passed <= 1, "the one that any program passes"
    assert found["graded"] == 1.0, "while right programs pass"


@pytest.mark.slow
@each_case
def test_disk_and_threads_are_bounded(user: str, walls: str) -> None:
    found = attack(user, walls)
    assert walls == "landlock-root" or found["threads"] < 1000
    assert all("exit status 3" in said or "temporary files: expected" in said for said in found["flooded"])


@pytest.mark.slow
@each_case
def test_nothing_is_left_behind(user: str, walls: str) -> None:
    found = attack(user, walls)
    assert found["left"] == [], "3,000 nested folders, names, links, and folders that nobody may read"
    assert found["processes"] == 0


@pytest.mark.slow
@each_case
def test_walls_are_recorded(user: str, walls: str) -> None:
    up = attack(user, walls)["up"].split()
    root = os.getuid() == 0 and user in ("itself", "container-root")
    expected = {"filter"}
    expected |= {walls} if walls in ("namespaces", "bubblewrap") else set()
    expected |= {"landlock-1" if walls == "landlock-1" else f"landlock-{find_version()}"} if find_version() else set()
    expected |= {"own-user"} if root and walls not in ("namespaces", "landlock-root") else set()
    assert set(up) == expected


def test_suite_sees_escapes() -> None:
    """Without walls and filter the attempts succeed, so that a refusal elsewhere is the wall's."""
    user = "ordinary" if os.getuid() == 0 else "itself"
    run = subprocess.run(make_command(user, "control"), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found["attempts"].values()) == {"done"}
    assert len(found["attempts"]) == 12
    assert {text.partition(":")[0] for text in found["damage"]} == {"files", "network", "processes", "kernel"}


@pytest.mark.parametrize("user", ["itself", "ordinary"])
@pytest.mark.parametrize("walls", ["namespaces", "bubblewrap", "landlock"])
def test_program_ends_with_its_host(user: str, walls: str) -> None:
    attack(user, walls)  # or skipped
    # A host that is killed leaves its program's folder, which is not to stay here.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        where = os.environ | {"TMPDIR": folder}
        command = make_command(user, "orphan", walls)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=where) as host:
            assert host.stdout is not None
            orphans = json.loads(host.stdout.readline())
            os.kill(host.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while left := [pid for pid, created in orphans if is_alive(pid, created)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)


CODE_TASKS = ["-m", "laguna_serve.evals.code_tasks", "--check-canonical", "--skip-probes"]


def check_canonical(user: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command that grades the shipped problems' own solutions, as a user."""
    command = make_command(user)[: -len(RUN)] if user != "itself" else []
    return subprocess.run([*command, sys.executable, *CODE_TASKS, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_command_takes_the_walls_that_a_container_leaves() -> None:
    if not find_version():
        pytest.skip("this kernel has no Landlock")
    done = check_canonical("container-user")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["walls"] == "landlock"


@pytest.mark.slow
def test_command_gives_no_figures_without_walls() -> None:
    done = check_canonical("old-container-user")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("code_tasks.py: error: namespaces: ")
    assert len(done.stderr.splitlines()) == 1
    for text in ("Operation not permitted", "expected a kernel with Landlock", "install bubblewrap", "(none)"):
        assert text in done.stderr
    forced = check_canonical("old-container-user", "--walls", "none")
    assert forced.returncode == 0
    assert "warning: without walls" in forced.stderr
    assert json.loads(forced.stdout.splitlines()[-1])["walls"] == "none"


def is_alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
