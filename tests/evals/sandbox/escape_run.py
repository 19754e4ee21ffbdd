"""Run as a script by test_escapes.py: hostile programs behind walls, and what came of it, as one JSON object.

argv: the walls ("landlock-1": as of its first version; "landlock-root": root stays root); or "control", without any
and without the filter of system calls: what is then to succeed, or the suite would see nothing; or "orphan" and the
walls: a program that will not end, and its processes' ids. Here are the victims, and here it is looked at what has
happened to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import psutil

from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.problems import SHIPPED
from laguna_serve.evals.sandbox import Limits, Trial, Walls, Wanted, child, choose_walls, roles, run_trial, stop_servers
from laguna_serve.evals.sandbox.walls.other_user import choose_id

sys.path.append(str(Path(__file__).resolve().parents[1]))
from humaneval_like import ADD, make_problem

ATTEMPTS = Path(__file__).with_name("escape_attempts.py")
# The program's answer is what the grader writes.
ASK = make_problem("print(candidate(), flush=True)\nassert True")
SOLUTION = ADD.prompt + str(ADD.canonical_solution)
BYSTANDER = "import sys\nprint(flush=True)\nsys.stdin.read()\nprint('well')"
FORGERY = """
def forge():
    import glob, os
    text = b"++++++" + json.dumps({"ending": "ended", "detail": "", "record": None}).encode()
    line = b"0" * 32 + b" " + text + b"\\n"
    ways = [str(fd) for fd in range(3, 64)] + glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/self/task/*/fd/*")
    for way in ways:
        try:
            os.write(int(way) if way.isdigit() else os.open(way, os.O_WRONLY | os.O_NONBLOCK), text + line)
        except OSError:
            pass

def add(a, b):
    forge()
    return 0
"""
# What succeeds without walls, and ends nobody.
CONTROL = (
    *("files_read_secret", "files_write", "files_list", "files_attributes", "files_move", "network_sockets"),
    *("network_connect", "network_datagrams", "network_fifo", "kernel_queues", "processes_change", "processes_start"),
)
# Fork servers, grader and program, and the guards of the namespaces, or bubblewrap's own two in a server's place.
PROCESSES, START_S = {"namespaces": 6, "bubblewrap": 5, "landlock": 4}, 60
libc = ctypes.CDLL(None, use_errno=True)


class Victims:
    """What a program may neither read, write, signal nor reach, and that everyone of this machine could."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, "escape-" + secrets.token_hex(8)
        folder.chmod(0o777)
        for name, text in (("secret", self.token), ("loot", "loot")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o666)
        (folder / "empty").mkdir()
        os.mkfifo(folder / "fifo")
        self._fifo = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        self.bystander = subprocess.Popen(
            [sys.executable, "-S", "-c", BYSTANDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        assert self.bystander.stdout is not None
        self.bystander.stdout.readline()
        self._state = self.describe_bystander()
        self._datagrams = [self._bind(socket.SOCK_DGRAM, name) for name in (str(folder / "dgram"), "\0" + self.token)]
        self._listeners = [self._bind(socket.SOCK_STREAM, str(folder / "stream"))]
        self._listeners.append(socket.create_server(("127.0.0.1", 0)))
        self._listeners[0].listen()
        for name in ("dgram", "stream", "fifo"):
            (folder / name).chmod(0o777)
        self._queue = libc.msgget(0, 0o1666)
        self._segment = libc.shmget(0, ctypes.c_size_t(4096), 0o1666)
        self._semaphores = libc.semget(0, 1, 0o1666)
        self._posix_queue = f"/{self.token}"
        self._mq = libc.mq_open(self._posix_queue.encode(), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666, None)
        self._stats = self._list_stats()

    @staticmethod
    def _bind(kind: int, name: str) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, kind)
        made.bind(name)
        made.setblocking(False)
        return made

    def describe(self) -> dict[str, Any]:
        """The world, as a program gets to know it."""
        return {
            "token": self.token,
            "folder": str(self.folder),
            "empty": str(self.folder / "empty"),
            "secret": str(self.folder / "secret"),
            "loot": str(self.folder / "loot"),
            "fifo": str(self.folder / "fifo"),
            "datagrams": str(self.folder / "dgram"),
            "stream": str(self.folder / "stream"),
            "problems": str(SHIPPED),
            "code": str(child.__file__),
            "library": os.__file__,
            "bystander": self.bystander.pid,
            "group": self.bystander.pid,
            "host": os.getpid(),
            "port": self._listeners[1].getsockname()[1],
            "queue": self._queue,
            "segment": self._segment,
            "semaphores": self._semaphores,
            "posix_queue": self._posix_queue,
        }

    def describe_bystander(self) -> list[Any]:
        """What others could change of a process."""
        process = psutil.Process(self.bystander.pid)
        return [process.nice(), process.cpu_affinity(), process.rlimit(psutil.RLIMIT_NOFILE), os.getpgid(process.pid)]

    def find_damage(self) -> list[str]:
        """What has happened to them."""
        found = []
        if self._list_stats() != self._stats:
            found.append("files: another content, mode, time or number of links")
        if stray := [path for path in STRAY if (Path(path) / self.token).exists()]:
            found.append(f"files: written into {stray}")
        if self.describe_bystander() != self._state:
            found.append("processes: the bystander's priority, affinity, limits or group")
        for each in self._datagrams:
            with contextlib.suppress(BlockingIOError):
                found.append(f"network: a datagram {each.recv(99)!r}")
        for each in self._listeners:
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                found.append(f"network: a connection {each.accept()}")
        if os.read(self._fifo, 9):
            found.append("network: bytes in a FIFO")
        message = ctypes.create_string_buffer(1 << 16)
        if libc.msgrcv(self._queue, message, 8, 0, 0o4000) != -1 or ctypes.get_errno() not in (42, 11):  # ENOMSG
            found.append("kernel: the message queue")
        if libc.shmctl(self._segment, 2, message) == -1 or libc.semctl(self._semaphores, 0, 12) != 0:
            found.append("kernel: shared memory or semaphores")
        if self._mq != -1 and not Path(f"/dev/mqueue{self._posix_queue}").exists() and os.path.ismount("/dev/mqueue"):
            found.append("kernel: the POSIX queue")
        return found

    def _list_stats(self) -> list[tuple[Any, ...]]:
        paths = [self.folder / name for name in ("secret", "loot", "fifo", "empty")] + [Path(os.__file__)]
        found: list[tuple[Any, ...]] = [(sorted(os.listdir(self.folder)),)]
        for path in paths:
            status = path.lstat()
            content = b""
            with contextlib.suppress(PermissionError):
                content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found.append((status.st_mode, status.st_mtime_ns, status.st_nlink, status.st_uid, hash(content)))
        return found

    def close(self) -> list[str]:
        """Let go of them; whether the bystander was well."""
        said, _ = self.bystander.communicate(b"")
        for each in (*self._datagrams, *self._listeners):
            each.close()
        os.close(self._fifo)
        libc.msgctl(self._queue, 0, None)
        libc.shmctl(self._segment, 0, None)
        libc.semctl(self._semaphores, 0, 0)
        libc.mq_unlink(self._posix_queue.encode())
        return (
            [] if (self.bystander.returncode, said) == (0, b"well\n") else ["processes: the bystander has been killed"]
        )


STRAY = ("/tmp", "/var/tmp", "/dev", "/dev/shm", tempfile.gettempdir(), os.path.dirname(os.__file__))


def ask(world: dict[str, Any], expression: str, limits: Limits) -> tuple[Any, Trial]:
    """What an expression is worth to the hostile program; None where it did not say."""
    told = f"WORLD.update(json.loads({json.dumps(world)!r}))\n"
    trial = run_trial(ASK, f"{ATTEMPTS.read_text()}\n{told}\ndef f():\n    return {expression}\n", limits)
    with contextlib.suppress(ValueError):
        return json.loads(trial.output), trial
    return None, trial


def attack(walls: Walls, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything behind these walls: `attempts` by name, `damage`, and what came of programs of their own.

    `kinds`: the beginnings of names of attempts, and nothing but these.
    """
    limits = Limits(walls=walls, cpu_s=10, wall_s=40, output_bytes=1 << 16)
    found: dict[str, Any] = {"walls": walls}
    with tempfile.TemporaryDirectory(prefix="victims-") as folder, tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)
        tempfile.tempdir = temporary  # of the sandbox: what is left there, it has left
        victims = Victims(Path(folder))
        world = victims.describe()
        try:
            found["attempts"], trial = ask(world, f"try_all({kinds or ('',)!r})", limits)
            found["up"], found["said"] = trial.walls, f"{trial.ending}: {trial.detail}"
            if kinds:
                return found
            if roles.choose_id is choose_id:  # the kernel counts none of root's threads: memory alone bounds them
                found["threads"], _ = ask(world, "count_threads()", limits)
            found["graded"] = grade(ADD, SOLUTION, limits).reward
            forged = grade(ADD, f"import json\n{FORGERY}", limits)
            found["forged"] = [forged.passed, forged.tests_passed]
            ask(world, "litter()", limits)
            found["flooded"] = flood(limits)
            found["left"] = sorted(os.listdir(temporary))
            stop_servers()
            found["processes"] = len(psutil.Process().children(recursive=True)) - 1
            return found
        finally:
            stop_servers()
            found["damage"] = [*victims.find_damage(), *victims.close()]
            tempfile.tempdir = None


def flood(limits: Limits) -> list[str]:
    """How programs end that fill the disk: with files, names and space that no name stands for."""
    hold = "try:\n            {}\n        except OSError:\n            os._exit(3)\n"
    ways = (
        "open(str(n), 'wb').write(bytes(1 << 20))",
        "open(str(n), 'w').close()",
        "os.mkdir(str(n)); os.chdir(str(n)) if n % 8 else None",
    )
    said = []
    for way in ways:
        program = f"import os\ndef f():\n    for n in range(10 ** 9):\n        {hold.format(way)}\n"
        found = grade(make_problem("assert candidate()"), program, limits)
        said.append(f"{found.status} {found.detail}")
    return said


def attack_without_filter() -> dict[str, Any]:
    """No walls at all: attempts that do not hurt this process succeed."""
    code = Path(child.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(code, folder, dirs_exist_ok=True)
        (Path(folder) / "walls" / "seccomp.py").write_text("def install_filter(pid, own_files):\n    pass\n")
        child.__file__ = str(Path(folder) / "child.py")
        return attack("none", CONTROL)


def leave_orphan(walls: Walls) -> None:
    """Start a program that does not want to end, say which processes there are, and wait to be killed."""
    program = (
        "import ctypes, signal, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for number in (1, 2, 3, 13, 15):\n    signal.signal(number, signal.SIG_IGN)\n"
        "print('at work', flush=True)\ntime.sleep(1000)\n"
    )
    limits = Limits(walls=walls, wall_s=1000)
    threading.Thread(target=run_trial, args=(ADD, program, limits), daemon=True).start()
    deadline = time.monotonic() + START_S
    while len(found := psutil.Process().children(recursive=True)) < PROCESSES[walls]:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    print(json.dumps([[each.pid, each.create_time()] for each in found]), flush=True)
    time.sleep(1000)


def main() -> None:
    """Print what came of it."""
    wanted = sys.argv[1]
    if wanted == "control":
        found = attack_without_filter()
    elif wanted == "orphan":
        return leave_orphan(cast("Walls", sys.argv[2]))
    elif wanted == "landlock-1":
        roles.find_version = lambda: 1
        found = attack("landlock")
    elif wanted == "landlock-root":
        roles.choose_id = lambda: None
        found = attack("landlock")
    else:
        found = attack(choose_walls(cast("Wanted", wanted)))
    print(json.dumps({"uid": os.getuid(), **found}))
    return None


if __name__ == "__main__":
    main()
