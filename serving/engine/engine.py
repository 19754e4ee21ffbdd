"""Starts one vLLM engine as a child, waits until it serves, and always takes all of it down again.

    with Engine(EngineConfig(model="tests/toy/teacher"), log_path=Path("engine.log")) as engine:
        requests.post(f"{engine.base_url}/v1/completions", json={"model": engine.model_name, …})

Linux only: the supervisor between us and vLLM (supervision/reaper.py) needs its process controls.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import psutil

from laguna_serve.serving.chat.vendor_defaults import NO_CONTRACT
from laguna_serve.serving.engine.batch_invariance import ExactError, check_exact
from laguna_serve.serving.engine.death import count_memory_kills, describe_death
from laguna_serve.serving.engine.log import find_notes, find_phase, measure_log, read_log
from laguna_serve.serving.engine.spare import REAPER, Spares
from laguna_serve.serving.kit.files import FULL
from laguna_serve.serving.kit.flags.vllm import find_value
from laguna_serve.serving.machine.local_http import OK, ask_engine
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, hold_port, plan_launch

POLL_S = 0.25
HEALTH_S = 5.0
ANNOUNCE_EVERY_S = 5.0
# What vLLM gets to end by itself after SIGTERM (it takes one or two) before it is killed.
STOP_GRACE_S = 10.0
# vLLM's flag for how long requests in flight may go on after SIGTERM; without it they are cut off at once.
SHUTDOWN_TIMEOUT = "--shutdown-timeout"
# Beyond the grace, for processes that have been killed to disappear: on a starved machine the kernel takes its time.
REAP_MARGIN_S = 120.0
# What vLLM calls the processes without which its HTTP server is an empty shell (utils/system_utils.py of vLLM 0.32).
CORE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
# Between the end of such a process and that of the whole engine, whose log has more to say by then.
DYING_S = 5.0
# An engine's last words: what it wrote in this time before it was found dead. What is older may be an error of any
# request.
WORDS_S = 20.0


class Engine:
    """One running vLLM engine, as a context manager.

    Attributes:
        config: as given.
        log_path: what vLLM writes goes here; an earlier file is overwritten. It may be deleted, or the disk full: the
            engine goes on (supervision/log_file.py).
        ready_timeout_s: how long the engine may take until it answers.
        stop_grace_s: how long vLLM may take to end by itself before it is killed, beyond the --shutdown-timeout of its
            configuration.
        base_url: "http://127.0.0.1:PORT", once entered.
        command: the vLLM command as started, once entered.
        model_name: what to send as "model".
        chat: the chat flags that it was started with, once entered.

    `api_key` is what vLLM asks of requests; None: nothing.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        log_path: Path,
        ready_timeout_s: float = 600.0,
        stop_grace_s: float = STOP_GRACE_S,
        announce: Callable[[str], None] | None = None,
        api_key: str | None = None,
        spares: Spares | None = None,
    ) -> None:
        self.config = config
        self.log_path = log_path
        self.ready_timeout_s = ready_timeout_s
        self.stop_grace_s = stop_grace_s + find_drain_s(config.extra_args)
        self.model_name = config.model_name
        self.base_url = ""
        self.command: list[str] = []
        self.gamma: int | None = None
        self.chat = NO_CONTRACT
        self._announce = announce or (lambda _line: None)
        self._api_key = api_key
        self._spares = spares or Spares()
        self._environment: dict[str, str] = {}
        self._imports = ""
        self._memory_kills = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._core: list[psutil.Process] = []
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._members: set[psutil.Process] = set()
        self._held: socket.socket | None = None  # the port, until the engine has it

    def __enter__(self) -> Engine:
        """Validate, start, and wait until the engine answers.

        Raises:
            EngineError: bad input (before anything is started), death or silence of the engine.
        """
        try:
            self._start()
            self._wait_until_ready()
            if self.config.exact:
                self._check_exact()
            self._spares.prepare(self.command, self._environment)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def pids(self) -> list[int]:
        """Every live process of vLLM; the supervisor, a bare Python, is not one of them."""
        if self._supervisor is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._members.update(psutil.Process(self._supervisor.pid).children(recursive=True))
        return sorted(process.pid for process in self._members if _is_alive(process))

    def check(self) -> None:
        """Raise EngineError with the cause from the log if the engine is not running."""
        if self.is_dead():
            raise EngineError(self.describe_death())
        if self._marks:  # it has been ready
            now = time.monotonic()
            self._marks.append((now, measure_log(self.log_path)))
            while self._marks[1][0] < now - WORDS_S:
                self._marks.popleft()

    def is_dead(self) -> bool:
        """Say whether vLLM, or a process that it cannot do without, has ended. Raises EngineError before the start."""
        if self._supervisor is None:
            raise EngineError(f"engine {self.model_name}: expected a running engine, got one that was not started")
        return has_ended(self._supervisor) or not all(map(_is_alive, self._core))

    def describe_death(self) -> str:
        """How and why it ended, in one line; waits a moment for its last words. Only of an engine that `is_dead`."""
        assert self._supervisor is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(DYING_S)
        since = self._marks[0][1] if self._marks else 0
        cause = describe_death(
            self._supervisor.poll(),
            read_log(self.log_path, since),
            memory_kills=count_memory_kills() - self._memory_kills,
        )
        return f"engine {self.model_name}: expected it to run, got {cause}; see {self.log_path}"

    def stop(self) -> None:
        """End every process of the engine; return when none is left. Safe to call at any time and again."""
        self._release_port()
        supervisor = self._supervisor
        if supervisor is None:
            return
        if supervisor.poll() is None:
            self.pids()
            supervisor.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(self.stop_grace_s + REAP_MARGIN_S)
        if supervisor.poll() is None:
            supervisor.kill()
            supervisor.wait()
        # Only a supervisor that was itself killed leaves something for us.
        for process in self._members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._members, timeout=REAP_MARGIN_S)
        self._supervisor = None
        self._members, self._core = set(), []

    def _start(self) -> None:
        launch = plan_launch(self.config, self._api_key)
        self.command, self.base_url = launch.command, launch.base_url
        self.gamma, self.chat, self._imports = launch.gamma, launch.chat, launch.imports
        self._environment = launch.environment
        for warning in launch.warnings:
            self._announce(f"warning: {warning}")
        # vLLM takes it seconds from now; until then nobody gets it by chance.
        self._held = hold_port(self.config.host, urlsplit(launch.base_url).port or 0)
        self._empty_log()
        self._memory_kills = count_memory_kills()
        self._supervisor = self._spares.take(
            self.command, launch.environment, grace_s=self.stop_grace_s, log=self.log_path
        ) or subprocess.Popen(
            [
                *(sys.executable, "-m", REAPER, str(os.getpid()), str(self.stop_grace_s)),
                *(os.path.abspath(self.log_path), *self.command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=launch.environment,
            start_new_session=True,
        )

    def _empty_log(self) -> None:
        """Refuse a log that cannot be written, unless that may pass: the supervisor reports a full disk."""
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.open("wb").close()
        except OSError as error:
            if error.errno not in FULL:
                got = f"expected a file that can be written, got {error.strerror or error}"
                raise EngineError(f"log {self.log_path}: {got}; choose another --log") from None

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        announced_phase, next_line = "", started
        while True:
            self.check()
            if self._is_healthy():
                break
            now = time.monotonic()
            phase = find_phase(read_log(self.log_path), self._imports)
            if now - started > self.ready_timeout_s:
                limit = f"expected an answer within {self.ready_timeout_s:.0f} s, got none while {phase}"
                raise EngineError(f"engine {self.model_name}: {limit}; see {self.log_path}")
            if phase != announced_phase or now >= next_line:
                self._announce(f"engine {self.model_name}: {phase}, {now - started:.0f} s")
                announced_phase, next_line = phase, now + ANNOUNCE_EVERY_S
            time.sleep(POLL_S)
        self._release_port()
        self.pids()
        self._core = [process for process in self._members if _is_core(process)]
        self._marks = deque([(time.monotonic(), measure_log(self.log_path))])
        for note in find_notes(read_log(self.log_path)):
            self._announce(f"engine {self.model_name}: {note}")
        self._announce(f"engine {self.model_name}: ready at {self.base_url} after {time.monotonic() - started:.0f} s")

    def _release_port(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _check_exact(self) -> None:
        self._announce(f"engine {self.model_name}: checking that its output depends on the prompt alone")
        try:
            tokens = check_exact(self.base_url, self.model_name, self._api_key)
        except ExactError as error:
            self.check()
            raise EngineError(f"engine {self.model_name}: {error}") from None
        self._announce(
            f"engine {self.model_name}: exact: {tokens} tokens the same to the bit alone, together, prefilled"
        )

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return ask_engine(self.base_url, "/health", timeout_s=HEALTH_S)[0] == OK
        return False


def find_drain_s(arguments: Sequence[str]) -> float:
    """Find how long vLLM lets requests go on after SIGTERM; what is no number of seconds it refuses by itself."""
    given = find_value(arguments, SHUTDOWN_TIMEOUT) or ""
    return float(given) if given.isdecimal() else 0.0


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Say whether a child has ended, whose status is left for `wait`.

    Not by `poll`: a KeyboardInterrupt in it can leave its lock taken, without which `wait` sees no end.
    """
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # somebody else has waited for it
        return process.poll() is not None


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_core(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(CORE_TITLES)
    return False
