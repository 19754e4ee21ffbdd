"""A small process between us and vLLM that makes sure nothing of vLLM outlives us.

vLLM is a tree (API server, engine core, worker, resource tracker) whose members start their own sessions, so neither
a process group nor the death of the API server is enough, and a Python `finally` does not run when its process is
killed with SIGKILL. This supervisor is its own session (a Ctrl-C in the terminal does not reach it), adopts
every orphan of the tree (PR_SET_CHILD_SUBREAPER), and ends the whole tree when its parent dies, when it gets SIGTERM,
or when vLLM's main process ends by itself. Should the supervisor be killed, the kernel kills the main process
(PR_SET_PDEATHSIG). What the tree writes comes here through a pipe and is appended to LOG (log_file.py); trouble with
that file is reported on stderr, and harms nobody. vLLM's sockets, which it leaves behind, lie in a folder that goes at
the end. Linux only.

    python -m laguna_serve.serving.supervision.reaper PARENT_PID GRACE_S LOG COMMAND…
    python -m laguna_serve.serving.supervision.reaper PARENT_PID spare COMMAND…

A spare command is told on its stdin what to do when that is known: this process gets a line, a JSON object of grace_s,
log and arguments, and hands the arguments on, a JSON list.

Exit status: that of the command, or 128 + the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from laguna_serve.serving.supervision.log_file import LogWriter

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# How long a dead parent may go unnoticed: the kernel sends nothing when the thread that started us has ended before.
PARENT_POLL_S = 0.25
# What the children of a main process that has ended get, to finish by themselves (shared memory is unlinked then).
ORPHAN_GRACE_S = 1.5
# Between two looks at those that are left, where no child's end wakes us: a list of them takes milliseconds, and who is
# not our child yet ends unheard.
LOOK_S = 0.1
# For the last lines to be written, once every process that could write more is gone.
LOG_S = 5.0
# Where vLLM makes its sockets; a socket's path has at most 107 bytes, and its own name there is a UUID.
SOCKETS, LONGEST_FOLDER = "VLLM_RPC_BASE_PATH", 107 - 1 - 36
CHUNK_BYTES = 1 << 16
SPARE = "spare"


@dataclass
class Task:
    """How a command is treated; without a log it is a spare one, which waits for its task."""

    grace_s: float = 0.0
    log: LogWriter | None = None


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends. Raises OSError: the system refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


@contextlib.contextmanager
def keep_sockets() -> Iterator[None]:
    """Give vLLM a folder for its sockets, and delete it; none where one is set already, or none can be made."""
    with contextlib.ExitStack() as stack:
        if SOCKETS not in os.environ:
            with contextlib.suppress(OSError):
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="laguna-sockets-", ignore_cleanup_errors=True)
                )
                if len(os.fsencode(folder)) <= LONGEST_FOLDER:
                    os.environ[SOCKETS] = folder
        yield


@keep_sockets()
def supervise(parent_pid: int, task: Task, command: list[str]) -> int:
    """Run the command until it ends, the parent is gone or a signal asks for the end; leave no process behind."""
    adopt_orphans()
    libc = ctypes.CDLL(None)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)

    def prepare_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    # preexec_fn is safe here: this process has one thread still.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if task.log is not None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,
        preexec_fn=prepare_child,
    )
    writer = threading.Thread(target=follow, args=(child, task), daemon=True)
    writer.start()
    asked_to_stop = False
    while child.poll() is None and not asked_to_stop:
        reap_orphans(child.pid)
        arrived = signal.sigtimedwait(WATCHED, PARENT_POLL_S)
        asked_to_stop = os.getppid() != parent_pid or (arrived is not None and arrived.si_signo != signal.SIGCHLD)
    if asked_to_stop:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(task.grace_s)
    end_tree(min(ORPHAN_GRACE_S, task.grace_s) if child.poll() is not None else 0.0)
    status = child.wait()
    if task.log is not None:
        writer.join(LOG_S)
    return status if status >= 0 else 128 - status


def follow(child: subprocess.Popen[bytes], task: Task) -> None:
    """Copy what a command writes to its log; a spare one gets its task before."""
    if task.log is None:
        line = read_line(0)
        if not line:  # nobody needs it
            return
        given = json.loads(line)
        task.grace_s, task.log = float(given["grace_s"]), LogWriter(Path(given["log"]), report)
        assert child.stdin is not None
        with contextlib.suppress(OSError), child.stdin as pipe:  # what has ended has left its words
            pipe.write(json.dumps(given["arguments"]).encode() + b"\n")
    assert child.stdout is not None
    copy_lines(child.stdout, task.log)


def read_line(descriptor: int) -> bytes:
    """Read a whole line; empty where the other end is closed before. Not by a reader that holds a lock at the end."""
    read = b""
    while not read.endswith(b"\n"):
        data = os.read(descriptor, CHUNK_BYTES)
        if not data:
            return b""
        read += data
    return read


def copy_lines(source: IO[bytes], log: LogWriter) -> None:
    """Everything that is written to the pipe, until nobody has it open."""
    while data := source.read(CHUNK_BYTES):
        log.write(data)
    log.close()


def report(line: str) -> None:
    """Print a line for people; they may have left."""
    with contextlib.suppress(OSError):
        print(f"laguna: warning: {line}", file=sys.stderr, flush=True)


def reap_orphans(main_pid: int) -> None:
    """Collect adopted processes that have ended, up to the main one, whose status is left for its own wait.

    The system is asked for those that have ended: a list of all that run costs 5% of a core where thousands do.
    """
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != main_pid:
        os.waitpid(ended.si_pid, 0)


def end_tree(grace_s: float) -> None:
    """Wait up to grace_s for every descendant to end, then kill them until none is left."""
    deadline = time.monotonic() + grace_s
    while survivors := list_live_descendants():
        if time.monotonic() >= deadline:
            for process in survivors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_S)


def list_live_descendants() -> list[psutil.Process]:
    """Every descendant that still runs; zombies are collected where they are ours and never counted."""
    live = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                live.append(process)
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return live


def main(parent_pid: str, kind: str, *rest: str) -> int:
    """Run as the arguments say; see above. Returns the exit status."""
    if kind == SPARE:
        return supervise(int(parent_pid), Task(), list(rest))
    log, *command = rest
    return supervise(int(parent_pid), Task(float(kind), LogWriter(Path(log), report)), command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
