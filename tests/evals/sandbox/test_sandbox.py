"""What hostile programs try, and that nothing of it has an effect outside of the jail."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from humaneval_like import ADD, make_problem
from walls_here import make_limits, needs_namespaces, needs_walls

from laguna_serve.evals.codegen import grading
from laguna_serve.evals.codegen.grading import Grade, grade
from laguna_serve.evals.sandbox import JailError, Limits, child, find_obstacle, roles, run_trial, stop_servers
from laguna_serve.evals.sandbox.walls import seccomp

pytestmark = [needs_walls, pytest.mark.slow]

# Says what a program's function gave, by way of the failure's detail.
ASK = make_problem("raise RuntimeError(repr(candidate()))")
LIMITS = make_limits(cpu_s=2, wall_s=6)
SHORT = make_limits(cpu_s=1, wall_s=2)
TOLD = """
def attempt(function, *args, **named):
    try:
        return function(*args, **named)
    except BaseException as error:
        return type(error).__name__
"""


def ask(program: str, limits: Limits = LIMITS) -> str:
    """What the program's f() returns, as text; or how it ended."""
    found = grade(ASK, TOLD + program, limits)
    assert not found.passed
    return found.detail.rpartition("RuntimeError: ")[2]


def is_server(process: psutil.Process) -> bool:
    """Whether a process is a fork server itself, not what it has forked."""
    return process.ppid() == os.getpid() and any("forkserver" in text for text in process.cmdline())


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After every test no process but the fork servers is left that was not there before, and no temporary folder.

    Once those are stopped, no new process is left at all.
    """
    # A folder of this test's own: others run beside it.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("jail-*"))

    before = children(), folders()
    yield
    servers = {child.pid for child in psutil.Process().children() if is_server(child)}
    assert children() - servers <= before[0], "with its jail"
    stop_servers()
    assert children() <= before[0] - servers
    assert folders() <= before[1]


BOMBS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that goes on": "import os\nwhile True: attempt(os.fork)",
    "memory bomb": "x = bytearray(1 << 40)",
    "memory bomb in steps": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "shared memory bomb": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26).write(bytes(1 << 26)))",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "one large file": "file = open('large', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(1 << 20))",
    "many names": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()",
    "flood of output": "while True: print('x' * 100000)",
    "flood of raw output": "import os\nwhile True: os.write(2, b'\\xff' * 65536)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(n): return g(n + 1)\ng(0)",
    "descriptors closed": "import os\nos.closerange(0, 1000)",
    "killed by itself": "import os\nos.kill(os.getpid(), 9)",
    "aborted": "import os\nos.abort()",
    "garbage for the judge": "import os\nfor fd in range(3, 64): attempt(os.write, fd, os.urandom(99999))",
    "a message of 4 GiB": "import os\nfor fd in range(3, 64): attempt(os.write, fd, b'\\xff' * 9)",
    "a message nested deeply": (
        "import os\nfor fd in range(3, 64): attempt(os.write, fd, (100000).to_bytes(4, 'big') + b'[' * 100000)"
    ),
}


@pytest.fixture(scope="module")
def blown() -> dict[str, Grade]:
    """Every bomb's grade; several at once, as most of them do nothing but wait for their time to be up."""
    programs = [f"{TOLD}{program}\ndef add(a, b):\n    return a + b + 1\n" for program in BOMBS.values()]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(BOMBS, pool.map(lambda program: grade(ADD, program, SHORT), programs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_in_its_jail(blown: dict[str, Grade], name: str) -> None:
    found = blown[name]
    assert (found.passed, found.reward, found.tests_total) == (False, 0.0, 6)
    assert found.status in ("timeout", "died", "broken")
    assert len(found.detail) < 1000


RETURNS = {
    "giant text": "'x' * (1 << 28)",
    "giant integer": "1 << (1 << 29)",
    "giant list": "[0] * (1 << 23)",
    "list within itself": "(lambda x: x.append(x) or x)([])",
    "nested list": "__import__('functools').reduce(lambda x, _: [x], range(5000), 0)",
    "range without end": "range(10 ** 30)",
    "iterator without end": "__import__('itertools').count()",
}


@pytest.mark.slow
@pytest.mark.parametrize("value", RETURNS.values(), ids=RETURNS)
def test_monstrous_value_is_a_failure(value: str) -> None:
    problem = make_problem("assert list(candidate()) == [1]")
    found = grade(problem, f"def f():\n    return {value}\n", SHORT)
    assert not found.passed
    assert len(found.detail) < 1000


@pytest.mark.slow
@needs_namespaces
def test_file_system_holds_the_library_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    program = f"""
import os
def f():
    home = [attempt(os.listdir, path) for path in ({str(Path.home() / ".ssh")!r}, {str(tmp_path)!r}, "/proc", "/sys")]
    paths = ("/etc/passwd", {str(Path(__file__))!r}, {str(Path(child.__file__))!r})
    files = [attempt(open, path) for path in paths]
    os.symlink({str(tmp_path / "secret")!r}, "/tmp/link")
    return home + files + [attempt(open, "/tmp/link"), attempt(os.link, "/etc/ld.so.cache", "/tmp/hard")]
"""
    assert ask(program) == repr(["FileNotFoundError"] * 8 + ["OSError"])


@pytest.mark.slow
@needs_namespaces
def test_file_system_is_read_only_outside_of_the_temporary_folder(tmp_path: Path) -> None:
    program = f"""
import os
def f():
    tried = [attempt(open, path, "w") for path in ("/x", "/usr/lib/x", "/etc/x", "/dev/x", os.__file__)]
    tried += [attempt(os.mkdir, "/y"), attempt(os.chmod, os.__file__, 0o777), attempt(os.remove, os.__file__)]
    open({str(tmp_path.name)!r}, "w").write("inside")
    return set(tried) <= {{"OSError", "PermissionError"}}, os.getcwd(), os.listdir("/tmp")
"""
    assert ask(program) == repr((True, "/tmp", [tmp_path.name]))
    assert list(tmp_path.iterdir()) == []
    assert not (Path(tempfile.gettempdir()) / tmp_path.name).exists()


@pytest.mark.slow
@needs_namespaces
def test_environment_and_parent_are_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    program = """
import os
def f():
    proc = [attempt(open, f"/proc/{pid}/environ") for pid in ("self", 1, os.getppid())]
    return dict(os.environ), os.getppid(), proc
"""
    assert ask(program) == repr(({}, 1, ["FileNotFoundError"] * 3))


@pytest.mark.slow
def test_signals_reach_nobody_else() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    program = f"""
import os, signal
def f():
    pids = (-1, 0, 1, os.getppid(), {victim.pid}, {os.getpid()}, -{os.getpgid(0)})
    return {{attempt(os.kill, pid, signal.SIGKILL) for pid in pids}}, attempt(os.killpg, {os.getpgid(0)}, 9)
"""
    assert ask(program) == repr(({"PermissionError"}, "PermissionError"))
    assert victim.poll() is None
    victim.communicate(b"\n")


@pytest.mark.slow
def test_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        program = f"""
import socket
def f():
    kinds = [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_UNIX, 1), (16, 3)]
    made = [attempt(socket.socket, *kind) for kind in kinds]
    return made, attempt(socket.create_connection, ("127.0.0.1", {server.getsockname()[1]}))
"""
        assert ask(program) == repr((["PermissionError"] * 4, "PermissionError"))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.slow
def test_no_second_process_and_no_new_privileges() -> None:
    program = """
import ctypes, os, subprocess
def f():
    libc = ctypes.CDLL(None, use_errno=True)
    calls = [libc.unshare(0x10000000), libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.ptrace(16, 1, 0, 0),
             libc.memfd_create(b"x", 0), libc.shmget(0, 1 << 30, 0o1600), libc.setuid(0), libc.chroot(b"/tmp"),
             libc.syscall(435, 0, 0), libc.prctl(24, 21, 0, 0, 0)]
    run = attempt(subprocess.run, ["/bin/true"]), attempt(os.posix_spawn, "/bin/true", ["x"], {}), attempt(os.setsid)
    return set(calls), run, attempt(os.execv, "/bin/true", ["true"])
"""
    assert ask(program) == repr(({-1}, ("PermissionError",) * 3, "PermissionError"))


@pytest.mark.slow
@needs_namespaces
def test_daemon_dies_with_its_jail_even_without_the_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The second wall: processes may be started here, and one that leaves its group outlives nothing.
    shutil.copytree(Path(child.__file__).parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "walls" / "seccomp.py").write_text("def install_filter(pid, own_files=True):\n    pass\n")
    monkeypatch.setattr(child, "__file__", str(tmp_path / "child.py"))
    program = """
import os, signal, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (1, 2, 15):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 64)
            time.sleep(1000)
        os._exit(0)
    forks = 0
    while type(pid := attempt(os.fork)) is int:
        if pid == 0:
            time.sleep(1000)
        forks += 1
    return pid, forks < 40
"""
    assert ask(program) == repr(("BlockingIOError", True))
    # The fork servers alone are left.
    processes = [process.info for process in psutil.process_iter(["cmdline", "ppid"])]
    assert {info["ppid"] for info in processes if str(tmp_path) in (info["cmdline"] or [])} == {os.getpid()}


def test_output_is_capped() -> None:
    problem = make_problem("assert candidate() == 1")
    trial = run_trial(problem, "def f():\n    print('x' * 10 ** 6)\n    import os; os._exit(3)\n", LIMITS)
    assert len(trial.output) == LIMITS.output_bytes
    assert (trial.ending, trial.exit_code) == ("gone", 3)


@pytest.mark.slow
def test_programs_in_threads_do_not_disturb_each_other() -> None:
    grades: list[Grade] = []
    programs = [
        "def add(a, b):\n    return a + b\n",
        "import os\nos.kill(0, 9)\n",
        "def add(a, b):\n    return a * b\n",
    ] * 4

    def work(program: str) -> None:
        grades.append(grade(ADD, program, LIMITS))

    threads = [threading.Thread(target=work, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.reward for found in grades) == [0.0] * 4 + [2 / 6] * 4 + [1.0] * 4


@pytest.mark.slow
def test_without_walls_the_filter_still_holds() -> None:
    limits = Limits(cpu_s=2, wall_s=6, walls="none")
    assert grade(ADD, ADD.prompt + str(ADD.canonical_solution), limits).passed
    program = f"""
import os, signal, socket, tempfile
def f():
    calls = [attempt(os.fork), attempt(socket.socket), attempt(os.kill, {os.getpid()}, signal.SIGKILL),
             attempt(os.kill, os.getppid(), signal.SIGKILL), attempt(os.setsid), attempt(os.kill, 0, signal.SIGKILL)]
    open("left", "w").write("x")
    return set(calls), os.getcwd() == tempfile.gettempdir(), os.path.basename(os.getcwd())[:5]
"""
    assert ask(program, limits) == repr(({"PermissionError"}, True, "jail-"))


@pytest.mark.slow
@needs_namespaces
def test_jail_that_cannot_be_built_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def paths() -> tuple[list[tuple[str, str]], list[str]]:
        return [("/usr/lib", "/no/such/folder")], []

    monkeypatch.setattr(roles, "list_paths", paths)
    with pytest.raises(JailError, match=r"expected its processes to start, got .*No such file"):
        grade(ADD, "def add(a, b):\n    return a + b\n")
    find_obstacle.cache_clear()
    try:
        assert "No such file" in str(find_obstacle())
    finally:
        find_obstacle.cache_clear()


def test_filter_refuses_a_machine_whose_numbers_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(seccomp.FilterError, match="expected x86_64 or aarch64, got riscv64"):
        seccomp.install_filter(1)


@pytest.mark.slow
def test_canonical_count_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grading._baselines.clear()
    runs = []
    monkeypatch.setattr(
        "laguna_serve.evals.codegen.grading.run_trial", lambda *args: runs.append(args) or run_trial(*args)
    )
    for _ in range(3):
        with contextlib.suppress(JailError):
            grade(ADD, "def add(a, b):\n    return 0\n", LIMITS)
    assert len(runs) == 4
