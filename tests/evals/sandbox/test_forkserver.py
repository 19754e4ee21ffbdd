"""The servers that fork the sandbox's processes: what a fork has of them and of its siblings, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from humaneval_like import ADD, PLUS, make_problem
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen import grading
from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.sandbox import JailError, Limits, run_trial, servers, stop_servers

pytestmark = [needs_walls, pytest.mark.slow]

ASK = make_problem("raise RuntimeError(repr(candidate()))")
LIMITS = make_limits(cpu_s=4, wall_s=30)
# Two servers, their forks, and in namespaces or bubblewrap the first process of the wall.
PROCESSES = {"namespaces": 5, "bubblewrap": 5, "landlock": 4}
OPEN_FILES = """
import os
import signal
def f():
    def is_open(fd):
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True
    return [fd for fd in range(4096) if is_open(fd)]
"""
WAIT_S = 60


def ask(program: str, limits: Limits = LIMITS) -> str:
    return grade(ASK, program, limits).detail.rpartition("RuntimeError: ")[2]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def list_servers(parent: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(parent).children()
    return [child for child in children if any("forkserver" in text for text in child.cmdline())]


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    stop_servers()
    yield
    stop_servers()
    assert list_servers() == []


@pytest.mark.slow
def test_servers_are_started_once() -> None:
    grade(ADD, ADD.prompt + "    return a + b\n", LIMITS)
    first = {server.pid for server in list_servers()}
    for _ in range(3):
        grade(ADD, ADD.prompt + "    return a + b\n", LIMITS)
    assert {server.pid for server in list_servers()} == first
    assert len(first) == 2, "one for each role"


@pytest.mark.slow
@pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, walls="none")], ids=["walled", "none"])
def test_program_has_its_own_descriptors_alone(limits: Limits) -> None:
    with ThreadPoolExecutor(4) as pool:  # while the server has those of others
        said = set(pool.map(lambda _: ask(OPEN_FILES, limits), range(12)))
    assert said == {"[0, 1, 2, 4]"}, "its input, its output twice, and the pipe to the tests"


def test_programs_memory_has_no_module_of_the_grader() -> None:
    program = "import sys\ndef f():\n    return sorted(n.rpartition('.')[2] for n in sys.modules if 'sandbox.' in n)\n"
    assert not {"grader", "observe", "instrument", "probes", "remote_program"} & set(eval(ask(program)))


def test_programs_see_no_request_and_no_program_before_theirs() -> None:
    secret = f"secret_{os.getpid()}_{time.monotonic_ns()}"
    grade(make_problem(f"assert candidate() == {secret!r}"), f"def f():\n    return {secret!r}\n", LIMITS)
    program = """
import gc, sys
def f():
    gc.unfreeze()
    texts, waiting, seen = [], [*gc.get_objects(), *sys.modules.values(), sys.argv], set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            texts += [value] if isinstance(value, (str, bytes)) else []
            waiting += gc.get_referents(value) if len(seen) < 10 ** 6 else []
    head = "_".join(["secret", ""])
    return [text for text in texts if (head if isinstance(text, str) else head.encode()) in text and text != head]
"""
    assert ask(program) == "[]"


@pytest.mark.slow
def test_forks_do_not_draw_the_same_numbers() -> None:
    program = "import random, uuid\ndef f():\n    return random.random(), uuid.uuid4().hex\n"
    assert len({ask(program) for _ in range(3)}) == 3


@pytest.mark.slow
def test_server_that_ends_is_started_anew() -> None:
    good = ADD.prompt + "    return a + b\n"
    assert grade(ADD, good, LIMITS).passed
    for server in list_servers():
        server.kill()
        server.wait(WAIT_S)
    assert grade(ADD, good, LIMITS).passed


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_server_that_ends_under_a_trial_is_no_verdict(number: int) -> None:
    grade(ADD, ADD.prompt + "    return a + b\n", LIMITS)
    server = list_servers()[number]

    def kill() -> None:
        wait_until(lambda: bool(server.children(recursive=True)))
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(JailError, match="fork server"):
        run_trial(ADD, "import time\ntime.sleep(1000)\n", LIMITS)
    killer.join()


def test_server_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BOOT", "raise SystemExit('no server today')")
    monkeypatch.setattr(servers, "PYTHON", [sys.executable, "-c", servers.BOOT])
    with pytest.raises(JailError, match="expected its fork server to start, got no server today"):
        run_trial(ADD, "", LIMITS)


HOST = """
import sys, time
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import Limits, run_trial
problem = Problem("x", "", "f", "def check(candidate):\\n    candidate()\\n", None)
run_trial(problem, "def f(): pass\\n", Limits(walls=sys.argv[1]))
print("ready", flush=True)
run_trial(problem, "import time\\ntime.sleep(1000)\\n", Limits(wall_s=1000.0, cpu_s=1000, walls=sys.argv[1]))
"""


@pytest.mark.slow
def test_servers_and_forks_end_with_a_host_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOST, LIMITS.walls], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"
        wait_until(lambda: len(psutil.Process(host.pid).children(recursive=True)) >= PROCESSES[LIMITS.walls])
        family = psutil.Process(host.pid).children(recursive=True)
        host.kill()
    _, alive = psutil.wait_procs(family, WAIT_S)
    assert alive == []


FORKED_HOST = """
import os, sys
from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import Limits
problem = Problem("x", "", "f", "def check(candidate):\\n    assert candidate(2) == 4\\n", None)
def passes(): return grade(problem, "def f(x): return x * x\\n", Limits(walls=sys.argv[1])).passed
assert passes()
pid = os.fork()
if not pid:
    ok = [passes() for _ in range(20)]
    from laguna_serve.evals.sandbox import stop_servers
    stop_servers()
    os._exit(0 if all(ok) else 1)
ok = [passes() for _ in range(20)]
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert all(ok) and passes()
"""


@pytest.mark.slow
def test_fork_of_the_host_has_servers_of_its_own() -> None:
    command = [sys.executable, "-c", FORKED_HOST, LIMITS.walls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_server_cannot_be_read_or_written_by_a_program_without_walls() -> None:
    command = [sys.executable, str(Path(__file__).with_name("server_probe.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("RuntimeError: {'PermissionError'}"), done


@pytest.mark.slow
def test_numpy_is_imported_once_for_tests_that_want_it() -> None:
    good = PLUS.prompt + str(PLUS.canonical_solution)
    assert all(grade(PLUS, good, LIMITS).passed for _ in range(2))
    assert len(list_servers()) == 2
    assert grade(ADD, ADD.prompt + "    return a + b\n", LIMITS).passed
    assert len(list_servers()) == 3, "one that has not imported it"


@pytest.mark.slow
def test_candidates_of_one_problem_wait_for_one_canonical_run(monkeypatch: pytest.MonkeyPatch) -> None:
    grading._baselines.clear()
    programs: list[str] = []

    def run(problem: object, program: str, *rest: object) -> object:
        programs.append(program)
        return run_trial(problem, program, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("laguna_serve.evals.codegen.grading.run_trial", run)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: grade(ADD, "def add(a, b):\n    return a + b\n", LIMITS).passed, range(8)))
    assert programs.count(ADD.prompt + str(ADD.canonical_solution)) == 1
    assert len(programs) == 9


def test_servers_are_out_of_the_terminals_reach() -> None:
    grade(ADD, ADD.prompt + "    return a + b\n", LIMITS)
    assert os.getsid(0) not in {os.getsid(server.pid) for server in list_servers()}


@pytest.mark.slow
def test_time_runs_from_when_both_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    real = servers.Server.__init__

    def start_slowly(self: servers.Server, role: str, *rest: object) -> None:
        real(self, role, *rest)  # type: ignore[arg-type]
        if role == "grader":
            os.kill(self._process.pid, signal.SIGSTOP)
            threading.Timer(2.5, os.kill, (self._process.pid, signal.SIGCONT)).start()

    monkeypatch.setattr(servers.Server, "__init__", start_slowly)
    assert grade(ADD, "def add(a, b):\n    return a + b\n", make_limits(cpu_s=4, wall_s=2.0)).tests_passed == 6
