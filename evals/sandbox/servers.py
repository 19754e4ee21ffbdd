"""The host's side of the fork servers (forkserver.py): they are started when first needed, and serve many trials.

There is one for each role and set of packages that it is to have imported. One that has ended is started anew; a fork
of the host's own gets servers of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# How long processes may take to start on a starved machine.
START_S = 60.0
# What a server says: forkserver.py may not be imported here.
FORKED, ENDED = b"+", b"."
LINE_BYTES = 500
# The children start without site-packages and without this project installed: they get its name and its folder.
BOOT = """
import sys, types
folder = sys.argv.pop()
for name, path in (("laguna_serve", []), ("laguna_serve.evals", []), ("laguna_serve.evals.sandbox", [folder])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from laguna_serve.evals.sandbox.forkserver import main
main()
"""
# -I would ignore the hash seed, without which sets are in another order each time; little else is in the environment:
# the address space, which is bounded, would be used up by 64 MiB for each of a program's first threads.
PYTHON = [sys.executable, "-P", "-s", "-S", "-c", BOOT]
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
# numpy's BLAS starts a thread per core otherwise.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ServerError(OSError):
    """A fork server does not start, or has ended."""


class Process:
    """A fork of a server's: what subprocess.Popen is to a child. Not for several threads at once."""

    def __init__(self, status: socket.socket) -> None:
        self._status, self._fd = status, -1
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative of the signal that ended it; None while it runs."""
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: it still runs.
            ServerError: the server has ended, or could not fork.
        """
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            self._receive(max(0.0, deadline - time.monotonic()))
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, once it is there; one that has ended is past it.

        Raises:
            ServerError: see `wait`.
        """
        while self._fd < 0 and self.returncode is None:
            self._receive(START_S)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Close the connection to it; it is not ended."""
        self._status.close()
        if self._fd >= 0:
            os.close(self._fd)

    def _receive(self, timeout: float) -> None:
        if not select.select([self._status], [], [], timeout)[0]:
            raise TimeoutError
        try:
            said, fds, _, _ = socket.recv_fds(self._status, LINE_BYTES, 1)
        except ConnectionResetError:
            said, fds = b"", []
        if said[:1] == FORKED:
            (self._fd,) = fds
        elif said[:1] == ENDED:
            self.returncode = int(said[1:])
        else:
            text = said[1:].decode(errors="replace")
            raise ServerError(f"sandbox: expected a process from the fork server, got {text or 'its end'}")


class Server:
    """One server. `spawn` may be called from several threads at once."""

    def __init__(self, role: str, folder: str, folders: tuple[str, ...], packages: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [role, str(theirs.fileno()), os.pathsep.join(folders), ",".join(packages), folder]
            self._process = subprocess.Popen(
                [*PYTHON, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT | ONE_THREAD,
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        ours.settimeout(START_S)
        try:
            started = ours.recv(1)
        except OSError:
            started = b""
        if not started:
            self.close()
            raise ServerError(f"sandbox: expected its fork server to start, got {self._said or 'nothing'}")

    def spawn(self, fds: list[int]) -> Process:
        """Fork a process that has these descriptors.

        Raises:
            ServerError: the server has ended.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._socket, [b"f"], [theirs.fileno(), *fds])
            except OSError as error:
                ours.close()
                raise ServerError(f"sandbox: expected a fork server, got {error}") from error
        return Process(ours)

    def close(self) -> None:
        """End it, and with it what it has forked."""
        self._socket.close()
        self._process.kill()
        _, said = self._process.communicate()
        self._said = said.decode(errors="replace").strip()[-LINE_BYTES:]

    def forget(self) -> None:
        """Drop the parent's server after a fork, without ending it."""
        self._socket.close()


_servers: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], Server] = {}
_lock = threading.Lock()


def spawn(role: str, fds: list[int], folder: Path, folders: tuple[str, ...], packages: tuple[str, ...]) -> Process:
    """Spawn a new process of a role, by a server of those of its kind.

    `fds`: configuration, output, ready, wire, report.

    `folder` is the sandbox's code; `packages` are imported beforehand, from `folders`.

    Raises:
        ServerError: no server starts.
    """
    key = (role, str(folder), folders, packages)
    for last in (False, True):
        with _lock:
            server = _servers.get(key) or _servers.setdefault(key, Server(*key))
        try:
            return server.spawn(fds)
        except ServerError:
            with _lock:
                if _servers.get(key) is server:
                    _servers.pop(key).close()
            if last:
                raise
    raise AssertionError


def stop_servers() -> None:
    """End every server, and all that they have forked."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    while _servers:
        _servers.popitem()[1].forget()


os.register_at_fork(after_in_child=_forget)
atexit.register(stop_servers)
