"""The processes of a relay's benchmark: engines, relays and the gateway, each watched from outside."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from laguna_serve.serving.engine import EngineError

START_S = 90.0
# What a process may take to end by itself.
END_S = 10.0
KEY = "sk-bench"
GATEWAY_COMMAND = (sys.executable, "-m", "laguna_serve.serving.cli", "gateway")


def write_config(folder: Path, engines: Sequence[int], admin: int = 0) -> Path:
    """Write a gateway's configuration with all that costs a request something.

    That is keys with limits, budgets and usage, access log, affinity, admin port.
    """
    upstreams = "".join(
        f"""
        [[models.upstreams]]
        name = "engine-{i}"
        url = "http://127.0.0.1:{port}"
        max_in_flight = 1024
        """
        for i, port in enumerate(engines)
    )
    text = f"""
        [server]
        access_log = true
        [admin]
        port = {admin}
        [access]
        usage_file = {json.dumps(str(folder / "usage.sqlite"))}
        [[keys]]
        name = "bench"
        sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
        max_in_flight = 4096
        requests_per_minute = 1000000
        tokens_per_minute = 1000000000
        tokens_per_day = 1000000000000
        models = ["fake"]
        priority = 1
        [[models]]
        name = "fake"
        affinity = "session"
        pass_priority = true
        ask_usage = true
        {upstreams}
        """
    path = folder / "gateway.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@contextmanager
def run_child(command: Sequence[str], port: int, log: Path) -> Iterator[psutil.Process]:
    """Run a process that listens on `port` when the block begins, and is gone with its children when it ends.

    Raises:
        EngineError: it does not listen in time.
    """
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + START_S
            while not _listens(process.pid, port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise EngineError(f"{log.stem}: expected it to listen on {port}, got none; see {log}")
                time.sleep(0.05)
            yield psutil.Process(process.pid)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process; whatever of it and its children does not end by itself is killed."""
    with suppress(psutil.Error):
        family = _list_family(psutil.Process(process.pid))
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for one in family:
            with suppress(psutil.Error):
                one.kill()


def read_cpu_s(process: psutil.Process) -> float:
    """Processor time of a relay with its children, in seconds."""
    times = [one.cpu_times() for one in _list_family(process)]
    return float(sum(one.user + one.system for one in times))


def read_rss_mib(process: psutil.Process) -> float:
    """Resident memory of a relay with its children."""
    return float(sum(one.memory_info().rss for one in _list_family(process))) / 2**20


def _listens(pid: int, port: int) -> bool:
    try:
        return any(_has_port(process, port) for process in _list_family(psutil.Process(pid)))
    except psutil.Error:
        return False


def _has_port(process: psutil.Process, port: int) -> bool:
    return any(c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections())


def _list_family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]
