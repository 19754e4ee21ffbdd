"""A process that has imported vLLM and waits for what it is to serve, so that the next engine starts without imports.

Five of the six and a half seconds until an engine of the toy answers on two cores are imports, the same for all models.
The spare is a supervisor (supervision/reaper.py) with a server beneath it (plugins/processes/spare.py) that has the
environment of the engine before it; only an engine that is to have the same takes it, as much of the environment is
read while libraries are loaded. It holds 0.6 GiB while it waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from laguna_serve.serving.planning.command import SERVER_MODULE

REAPER = "laguna_serve.serving.supervision.reaper"
SERVER = "laguna_serve.plugins.processes.spare"
# How an engine's command begins that a spare can run.
SERVE = (sys.executable, "-m", SERVER_MODULE)
# Less is left to engines.
ROOM_BYTES = 2 << 30
END_S = 5.0
logger = logging.getLogger(__name__)


class Spares:
    """At most one spare process, which this one's engines share; any thread may ask."""

    def __init__(self) -> None:
        self._wanted = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: Mapping[str, str] = {}

    def want(self, wanted: bool) -> None:
        """Ask for a spare from the next engine on, or for none from now on; it does not wait."""
        self._wanted = wanted
        if not wanted and self._process is not None:
            threading.Thread(target=self._drop, name="spare").start()

    def prepare(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a spare for the next engine, if it is wanted and there is room, like one that runs now."""
        with self._lock:
            if not self._wanted or not _is_server(command) or self._fits(environment):
                return
            if psutil.virtual_memory().available < ROOM_BYTES:
                return
            self._end()
            self._environment = dict(environment)
            try:
                self._process = subprocess.Popen(
                    [*(sys.executable, "-m", REAPER, str(os.getpid()), "spare"), *(sys.executable, "-m", SERVER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=self._environment,
                    start_new_session=True,
                )
            except OSError as error:  # the engine that runs is none the worse
                logger.warning("spare process: expected one to start, got %s; the next engine does without", error)

    def take(
        self, command: Sequence[str], environment: Mapping[str, str], *, grace_s: float, log: Path
    ) -> subprocess.Popen[bytes] | None:
        """Start a server's command in the spare; None where there is none, or none that fits."""
        with self._lock:
            if not _is_server(command) or not self._fits(environment):
                return None
            process, self._process = self._process, None
        if process is None or process.stdin is None:
            return None
        job = {"grace_s": grace_s, "log": os.path.abspath(log), "arguments": list(command[len(SERVE) :])}
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(job).encode() + b"\n")
        except OSError:
            end(process)
            return None
        return process

    def close(self) -> None:
        """End the spare, and make no other."""
        self._wanted = False
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            if not self._wanted:
                self._end()

    def _fits(self, environment: Mapping[str, str]) -> bool:
        return self._process is not None and self._process.poll() is None and self._environment == environment

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            end(process)


def _is_server(command: Sequence[str]) -> bool:
    return tuple(command[: len(SERVE)]) == SERVE


def end(process: subprocess.Popen[bytes]) -> None:
    """End a supervisor, which ends what it supervises."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    process.kill()
    process.wait()
