"""The fork server's side of the sandbox: a process that has imported what the jail needs, and forks for every request.

Starting an interpreter and importing costs more than most programs and their tests. A server is of one role: the one
that forks workers has imported nothing of the grader. It reads no request: a fork gets its configuration, its pipes and
nothing else by descriptors, so no program and no test is ever in the memory that the next fork begins with.

A request is a packet of descriptors on a socket: status, configuration, output, ready, wire, and a grader's report.
What becomes of the fork is said on its `status` socket: "+" with a descriptor of the process, then "." and the exit
status; or "!" and why there is none. Forks die with the server (walls/jail.py), and the server ends when its socket
closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.walls import jail

# Descriptors of a request; a worker has no report.
MAX_FIELDS = 6
# What many programs and tests import, so that the server has it already.
COMMON = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools"),
    *("hashlib", "heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string"),
    "typing",
)
PR_SET_DUMPABLE = 4
READY, FORKED, ENDED, FAILED = b"=", b"+", b".", b"!"

# The configuration is that of the role (walls/config.py), the numbers its wire and its report.
Work = Callable[[Any, int, int], None]


def main() -> None:
    """Entry of the server: argv is its role, the socket's number, folders for sys.path, and packages to import."""
    role, number, folders, packages = sys.argv[1:5]
    sys.argv[1:] = []
    sys.path += filter(None, folders.split(os.pathsep))
    for name in (*COMMON, *filter(None, packages.split(","))):
        with contextlib.suppress(Exception):  # whoever needs it will see why
            importlib.import_module(name)
    work = load(role)
    gc.collect()
    gc.freeze()  # or a fork's collections would copy every page
    # A program without walls runs under the same user: nothing of the server is to be read or written through /proc.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    control = socket.socket(fileno=int(number))
    control.send(READY)
    Server(control, work).serve()


def load(role: str) -> Work:
    """Load what the forks of a role do once they are in jail; the other role's modules are not imported."""
    if role == "grader":
        from laguna_serve.evals.sandbox.inside.grader import run_grader

        return run_grader
    from laguna_serve.evals.sandbox.inside.worker import play

    return lambda config, wire, _: play(config, wire)


class Server:
    """Forks on request, and buries."""

    def __init__(self, control: socket.socket, work: Work) -> None:
        self._control, self._work = control, work
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._forks: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> None:
        """Answer requests until the other side closes."""
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._control.fileno():
                    self._bury(fd)
                elif not self._accept():
                    return

    def _accept(self) -> bool:
        """Take a request; False when there will be none any more."""
        try:
            _, fds, _, _ = socket.recv_fds(self._control, 1, MAX_FIELDS)
        except ConnectionResetError:
            return False
        if not fds:
            return False
        status = socket.socket(fileno=fds[0])
        try:
            self._fork(status, fds[1:])
        except OSError as error:
            _say(status, FAILED + str(error).encode())
            status.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)
        return True

    def _fork(self, status: socket.socket, fds: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            try:
                _become(parent, fds, self._work)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(1)
        process = os.pidfd_open(pid)
        self._forks[process] = pid, status
        self._poll.register(process, select.POLLIN)
        _say(status, FORKED, process)

    def _bury(self, process: int) -> None:
        pid, status = self._forks.pop(process)
        _, code = os.waitpid(pid, 0)
        _say(status, ENDED + str(os.waitstatus_to_exitcode(code)).encode())
        status.close()
        self._poll.unregister(process)
        os.close(process)


def _say(status: socket.socket, text: bytes, *fds: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked may be gone
        socket.send_fds(status, [text], fds)


def _become(server: int, fds: list[int], work: Work) -> None:
    """Keep the request's descriptors alone in the fork, numbered from 0 on, and go to jail. Does not return."""
    os.setsid()
    config, output, *rest = fds
    # The kernel gave them ascending numbers above 2: none of them is overwritten before it has been moved.
    for number, fd in enumerate((config, output, output, *rest)):
        os.dup2(fd, number)
    kept = 3 + len(rest)
    os.closerange(kept, os.sysconf("SC_OPEN_MAX"))
    ready, wire, *report = range(3, kept)
    jail.main(server, work, ready, wire, report[0] if report else -1)
