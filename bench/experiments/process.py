"""One command in a process group of its own, with a log and a time limit, and nothing of it left when it is over.

The supervisor of engines (serving/supervision/reaper.py) stands between: it adopts whatever the command leaves behind,
engines too, and ends it, also when we are killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from laguna_serve.serving.kit.errors import CommandError

SUPERVISOR = "laguna_serve.serving.supervision.reaper"
# For a command to write what it has after SIGINT, and engines to end; then all of it is killed.
GRACE_S = 60.0
# After SIGTERM to the supervisor, which kills by itself after the first of them.
KILL_S, REAP_S = 2.0, 60.0
TAIL_BYTES = 1 << 16


class StuckError(CommandError):
    """A command's processes that could not be ended; one line."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended: its exit status, or who stopped it, and after how many seconds."""

    status: int | None
    stopped_by: Literal["limit", "person"] | None
    wall_s: float


def run_process(command: Sequence[str], log: Path, limit_s: float, cwd: Path) -> Ending:
    """Run it to its end, or until the limit or Ctrl-C: then SIGINT, and after GRACE_S the end of all its processes.

    Raises:
        StuckError: processes could not be ended.
    """
    started = time.monotonic()
    supervisor = subprocess.Popen(
        [sys.executable, "-m", SUPERVISOR, str(os.getpid()), str(KILL_S), str(log), *command],
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    stopped_by: Literal["limit", "person"] | None = None
    try:
        supervisor.wait(limit_s)
    except subprocess.TimeoutExpired:
        stopped_by = "limit"
    except KeyboardInterrupt:
        stopped_by = "person"
    if stopped_by is not None:
        _stop(supervisor)
    return Ending(None if stopped_by else supervisor.returncode, stopped_by, time.monotonic() - started)


def read_tail(log: Path) -> list[str]:
    """Read the last lines of a log that are not blank."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    _interrupt_command(supervisor.pid)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C does not wait
        supervisor.wait(GRACE_S)
        return
    supervisor.terminate()
    try:
        supervisor.wait(REAP_S)
    except subprocess.TimeoutExpired:
        expected = f"expected its processes to end within {REAP_S:.0f} s of being killed"
        raise StuckError(f"supervisor {supervisor.pid}: {expected}, got some that live; look for them") from None


def _interrupt_command(supervisor: int) -> None:
    """SIGINT to the command itself, the supervisor's first child; what it started, it ends by itself."""
    with suppress(psutil.Error, ValueError):
        first = min(psutil.Process(supervisor).children(), key=lambda process: float(process.create_time()))
        first.send_signal(signal.SIGINT)
