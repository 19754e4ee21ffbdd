"""The supervisor of an engine, in a process forked from server.py: it forks the API server instead of executing it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from laguna_serve.serving.supervision import reaper
from laguna_serve.serving.supervision.log_file import LogWriter

POLL_S = 0.02


class Forked:
    """`subprocess.Popen([python, "-m", module, *arguments])` by a fork."""

    def __init__(self, command: list[str], *, preexec_fn: Callable[[], None], **_named: Any) -> None:
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            preexec_fn()
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            for fd in (reading, writing):
                os.close(fd)
            sys.argv = ["", *command[3:]]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
            sys.exit(0)
        os.close(writing)
        self.stdout: IO[bytes] = open(reading, "rb", buffering=0)  # noqa: SIM115

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(POLL_S)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 15)


class _Subprocess:
    """`subprocess` for serving/supervision/reaper.py."""

    DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    TimeoutExpired, Popen = subprocess.TimeoutExpired, Forked


def supervise(grace_s: str, log: str, *command: str) -> int:
    """What reaper.py does when it is executed; its parent is the process that has forked it."""
    reaper.subprocess = _Subprocess  # type: ignore[attr-defined]
    task = reaper.Task(float(grace_s), LogWriter(Path(log), reaper.report))
    return reaper.supervise(os.getppid(), task, list(command))
