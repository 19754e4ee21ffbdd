"""Which walls there are: the choice among them, refusals, the grader's sealed report, right programs behind each."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from humaneval_like import ADD, PLUS, make_problem

from laguna_serve.evals.codegen import grading
from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.sandbox import (
    JailError,
    Limits,
    Walls,
    child,
    choice,
    choose_walls,
    find_obstacle,
    roles,
    run_trial,
)
from laguna_serve.evals.sandbox.inside.report import ForgedError, Seal
from laguna_serve.evals.sandbox.walls import landlock, seccomp, system_calls

ALL: tuple[Walls, ...] = ("namespaces", "bubblewrap", "landlock", "none")
each_wall = pytest.mark.parametrize("walls", ALL)


def make_limits(walls: Walls, **more: Any) -> Limits:
    if obstacle := find_obstacle(walls):
        pytest.skip(obstacle)
    return Limits(walls=walls, cpu_s=8, wall_s=30, **more)


RIGHT = {
    "threads and queues": """
    import queue, threading
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda x: x * x, range(9)))[-1] == 64
""",
    "asyncio": """
    import asyncio
    async def work(n):
        await asyncio.sleep(0)
        return n
    async def both():
        return sum(await asyncio.gather(*(work(n) for n in range(9))))
    return asyncio.run(both()) == 36
""",
    "temporary files": """
    import os, pathlib, shutil, tempfile
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file, tempfile.NamedTemporaryFile() as b:
        file.write(b'x'), b.write(b'y')
        path = pathlib.Path(folder, 'a', 'b')
        path.mkdir(parents=True)
        (path / 'c').write_text('z')
        os.replace(path / 'c', path / 'd')
        shutil.copyfile(path / 'd', path / 'e')
        return sorted(os.listdir(path)) == ['d', 'e'] and pathlib.Path(path, 'e').read_text() == 'z'
""",
    "devices": """
    import os
    with open(os.devnull, 'w') as out, open(os.devnull) as nothing, open('/dev/urandom', 'rb') as chance:
        return out.write('x') == 1 and nothing.read() == '' and len(chance.read(9)) == 9
""",
    "a data base": """
    import sqlite3
    for name in (':memory:', 'base'):
        with sqlite3.connect(name) as base:
            base.execute('create table t (x)')
            base.execute('insert into t values (3)')
            if base.execute('select x from t').fetchall() != [(3,)]:
                return False
    return True
""",
    "signals and time": """
    import random, select, signal, socket, time
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while not seen:
        time.sleep(0.001)
    signal.raise_signal(signal.SIGALRM)
    ours, theirs = socket.socketpair()
    ours.send(b'x'), random.seed(), random.SystemRandom().random()
    return len(seen) == 2 and bool(select.select([theirs], [], [], 5)[0]) and theirs.recv(1) == b'x'
""",
    "the library": """
    import bz2, csv, ctypes, datetime, decimal, fractions, hashlib, heapq, itertools, json, lzma, math, re, string, uuid
    import zlib, zoneinfo, xml.etree.ElementTree, email, html, textwrap, locale, platform, logging, unittest, os, sys
    return os.cpu_count() > 0 and platform.system() == 'Linux' and os.getpid() > 0
""",
}


@each_wall
def test_right_programs_pass(walls: Walls) -> None:
    limits = make_limits(walls)
    body = "".join(f"def f{number}():{text}\n" for number, text in enumerate(RIGHT.values()))
    program = f"{body}\ndef f(number):\n    return globals()[f'f{{number}}']()\n"
    checks = "\n".join(f"assert candidate({number}), {name!r}" for number, name in enumerate(RIGHT))
    found = grade(make_problem(checks), program, limits)
    assert found.passed, found.detail


@each_wall
def test_installed_packages_are_there_when_asked_for(walls: Walls) -> None:
    limits = make_limits(walls, packages=("numpy",), memory_bytes=2 << 30)
    program = "import numpy as np\ndef total(numbers):\n    return float(np.sum(np.array(numbers)))\n"
    assert grade(PLUS, program, limits).passed
    program = "import psutil\ndef total(numbers):\n    return 0.0\n"
    assert not grade(PLUS, program, limits).passed


@pytest.mark.slow
@each_wall
def test_wrong_programs_and_their_ends_are_told_apart(walls: Walls) -> None:
    limits = make_limits(walls)
    assert grade(ADD, "def add(a, b):\n    return a * b\n", limits).status == "failed"
    assert grade(ADD, "def add(a, b) return", limits).status == "broken"
    found = grade(ADD, "import os\ndef add(a, b):\n    os._exit(7)\n", limits)
    assert (found.status, "exit status 7" in found.detail) == ("died", True)
    found = grade(ADD, "def add(a, b):\n    while True: pass\n", Limits(walls=walls, cpu_s=1, wall_s=9))
    assert found.status == "timeout"


# The choice.


def test_first_walls_that_work_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: set[str] = set()
    monkeypatch.setattr(choice, "find_obstacle", lambda walls: f"no {walls}" if walls in broken else None)
    assert choose_walls() == "namespaces"
    broken |= {"namespaces"}
    assert choose_walls() == "bubblewrap"
    broken |= {"bubblewrap"}
    assert choose_walls() == "landlock"
    with pytest.raises(JailError, match="namespaces: no namespaces; allow unprivileged user namespaces"):
        choose_walls("namespaces")


def test_no_walls_no_reward_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_obstacle", lambda walls: f"no {walls}")
    with pytest.raises(JailError) as raised:
        choose_walls()
    said = str(raised.value)
    assert said.startswith("namespaces: no namespaces; bubblewrap: no bubblewrap; landlock: no landlock; allow ")
    assert "\n" not in said
    assert choose_walls("none") == "none"


def test_walls_that_the_system_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "find_version", lambda: 0)
    monkeypatch.setattr(roles, "is_installed", lambda: False)
    with pytest.raises(JailError, match="expected a kernel with Landlock"):
        grade(ADD, "", Limits(walls="landlock"))
    with pytest.raises(JailError, match="expected bubblewrap to be installed"):
        grade(ADD, "", Limits(walls="bubblewrap"))


def test_grade_without_walls_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def readable() -> tuple[list[tuple[str, str]], list[str]]:
        return [("/usr/lib", "/no/such/folder")], []

    make_limits("namespaces")
    monkeypatch.setattr(roles, "list_paths", readable)
    with pytest.raises(JailError, match=r"No such file.*; allow unprivileged user namespaces, install bubblewrap or"):
        grade(ADD, "")


def test_landlock_that_the_kernel_refuses_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def readable() -> tuple[list[tuple[str, str]], list[str]]:
        return [("/usr/lib", "/no/such/folder")], []

    make_limits("landlock")
    monkeypatch.setattr(roles, "list_paths", readable)
    with pytest.raises(JailError, match=r"expected its processes to start, got .*No such file"):
        run_trial(ADD, "", Limits(walls="landlock"))


# Landlock's rules.


def test_hidden_folders_are_left_out(tmp_path: Path) -> None:
    if not landlock.find_version():
        pytest.skip("this kernel has no Landlock")
    for name in ("lib/a.py", "lib/site/secret.py", "lib/site/deep/secret.py", "lib/b/site/secret.py", "lib/b/c/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "lib" / "link").symlink_to("site")
    (tmp_path / "lib" / "a-link.py").symlink_to("a.py")
    program = f"""
import os, sys
from laguna_serve.evals.sandbox.walls.landlock import Ruleset, find_version
rules = Ruleset(find_version())
rules.allow_except({str(tmp_path / "lib")!r}, [{str(tmp_path / "lib/site")!r}, {str(tmp_path / "lib/b/site")!r}])
rules.enforce()
for folder, _, names in sorted(os.walk({str(tmp_path)!r} + "/lib", followlinks=True)):
    for name in names:
        try:
            os.open(os.path.join(folder, name), os.O_RDONLY)
        except PermissionError:
            print("refused", end=" ")
        else:
            print(name, end=" ")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(run.stdout.split()) == sorted(["a.py", "a-link.py", "d.py", *["refused"] * 5])


# The filter.


def run_filter(machine: str, own_files: bool, number: int, *arguments: int) -> int:
    """What the filter says of a call: the kernel's machine, in so far as it is used."""
    code = seccomp.build_filter(machine, PID, own_files)
    words = {0: number, 4: seccomp.AUDIT_ARCH[machine]}
    for index, value in enumerate(arguments):
        words |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32}
    accumulator, at = 0, 0
    while True:
        kind, if_true, if_false, value = seccomp.struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if kind == seccomp.RETURN:
            return int(value)
        if kind == seccomp.LOAD:
            accumulator = words.get(value, 0)
        elif kind == seccomp.AND:
            accumulator &= value
        elif kind == seccomp.JUMP:
            at += value
        else:
            tests = {seccomp.IF_EQUAL: accumulator == value, seccomp.IF_AT_LEAST: accumulator >= value}
            at += if_true if (tests | {seccomp.IF_SET: bool(accumulator & value)})[kind] else if_false


PID = 4711
PERMITTED, REFUSED, LACKING = seccomp.ALLOW, seccomp.REFUSE | 1, seccomp.REFUSE | 38
MACHINES = list(seccomp.AUDIT_ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("own_files", [True, False])
@pytest.mark.parametrize("machine", MACHINES)
def test_filter_permits_what_its_tables_say(machine: str, own_files: bool) -> None:
    column = MACHINES.index(machine)
    plain = {numbers[column] for numbers in system_calls.ALLOWED.values()}
    attributes = {numbers[column] for numbers in system_calls.ATTRIBUTES.values()}
    special = {numbers[column] for numbers in (*system_calls.OWN.values(), *system_calls.OWN_OR_ZERO.values())}
    special |= {numbers[column] for numbers, *_ in seccomp.CHOSEN.values()}
    special |= {numbers[column] for numbers in (seccomp.CLONE, seccomp.SOCKETPAIR, seccomp.SENDTO)}
    special |= {numbers[column] for numbers in (seccomp.OPEN, seccomp.OPENAT)}
    permitted = plain | (attributes if own_files else set())
    for number in range(1 << 10):
        if number not in special:
            expected = PERMITTED if number in permitted else REFUSED if number < seccomp.FIRST_NEW else LACKING
            assert run_filter(machine, own_files, number) == expected, number
    assert run_filter(machine, own_files, 0xFFFFFFFF) == seccomp.KILL_PROCESS
    assert run_filter(machine, own_files, seccomp.X32 | 1) == seccomp.KILL_PROCESS


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_looks_at_arguments(machine: str) -> None:
    column = MACHINES.index(machine)

    def say(numbers: tuple[int | None, int | None], *arguments: int) -> bool:
        number = numbers[column]
        return number is not None and run_filter(machine, True, number, *arguments) == PERMITTED

    kill, fcntl = system_calls.OWN["kill"], seccomp.CHOSEN["fcntl"][0]
    assert [say(kill, pid, 9) for pid in (PID, 0, 1, PID + 1, -1, -PID)] == [True, *[False] * 5]
    limit = system_calls.OWN_OR_ZERO["prlimit64"]
    assert [say(limit, pid) for pid in (PID, 0, 1)] == [True, True, False]
    setters = (8, 10, 15, 1024, 1026, 1031, 1033)  # owner, signal, owner, lease, notification, pipe's size, seals
    assert [command for command in setters if say(fcntl, 3, command)] == []
    assert all(say(fcntl, 3, command) for command in (0, 1, 2, 3, 4, 6, 1030))
    assert [say(seccomp.CLONE, flags) for flags in (0x3D0F00, 0x11, 0x4111, 0x10000011)] == [True, False, False, False]
    pairs = list(itertools.product((1, 2), (1, 2, 5, 0x80001, 0x80802)))
    assert [pair for pair in pairs if say(seccomp.SOCKETPAIR, *pair)] == [(1, 1), (1, 0x80001)]
    sent = ((0, 0), (0, 1), (1 << 40, 0), (64, 0))
    assert [say(seccomp.SENDTO, 3, 0, 9, flags, address) for address, flags in sent] == [True, False, False, False]
    opened = (
        os.O_RDONLY,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDONLY | os.O_TRUNC,
        3,
        3 | os.O_TRUNC,
    )
    assert [say(seccomp.OPENAT, 0, 0, flags) for flags in opened] == [True, True, True, False, False, False]


# The report.


def test_seal_knows_its_own_lines_in_their_order() -> None:
    key = os.urandom(32)
    grader, host = Seal(key), Seal(key)
    lines = [grader.close(text).rstrip(b"\n") for text in (b"+", b"+", b'{"ending": "ended"}')]
    assert lines[0] != lines[1]
    assert [host.open(line) for line in lines] == [b"+", b"+", b'{"ending": "ended"}']


def test_seal_knows_others_lines() -> None:
    key = os.urandom(32)
    first, second = (Seal(key).close(b"+").rstrip(b"\n"), b"")
    grader = Seal(key)
    grader.close(b"-")
    second = grader.close(b"+").rstrip(b"\n")
    for line in (b"", b"+", b"0" * 32 + b" +", first[:-1] + b"-", second, Seal(bytes(32)).close(b"+")[:-1]):
        with pytest.raises(ForgedError, match="expected a line by the grader"):
            Seal(key).open(line)
    host = Seal(key)
    host.open(first)
    with pytest.raises(ForgedError):
        host.open(first)


@pytest.mark.parametrize("text", [b"++++++\n", b"+", b'{"ending": "ended", "detail": "", "record": null}\n'])
def test_forged_report_voids_the_verdict(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Should a program ever reach the grader's channel: here, somebody writes there before the grader."""
    grading._baselines.clear()
    limits = Limits(walls=choose_walls())  # which tries them
    spawn = child.spawn

    def forge(role: str, fds: list[int], *rest: Any) -> Any:
        if role == "grader":
            os.write(fds[-1], text)
        return spawn(role, fds, *rest)

    monkeypatch.setattr(child, "spawn", forge)
    found = grade(make_problem("assert candidate() == 1"), "def f():\n    return 1\n", limits)
    assert (found.passed, found.published, found.reward, found.status) == (False, False, 0.0, "died")
    assert "report: expected a line by the grader" in found.detail
