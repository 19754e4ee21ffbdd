"""Memory as the operating system and the driver count it: what is free, and what an engine's processes hold.

Proportional set size charges a page shared by n processes as 1/n to each, so the sum over an engine's processes is
what the machine would get back: resident sizes would count torch's libraries once per process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# cgroup v1 reports "no limit" as the largest page-aligned int64.
NO_LIMIT_BYTES = 1 << 62


def show_size(size_bytes: float) -> str:
    """Show a size as people write it: in GiB, or in MiB below one."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def total_bytes() -> int:
    """Memory of this machine, or of the container it is limited to."""
    total: int = psutil.virtual_memory().total
    limits = [limit for limit, _ in _read_cgroups()]
    return min([total, *limits])


def available_bytes() -> int:
    """Memory that can be taken now without swapping, within the container's limit if there is one.

    The page cache counts as available, as the kernel drops it under pressure: in a container that is its inactive
    part, in the way `docker stats` and Kubernetes count.
    """
    available: int = psutil.virtual_memory().available
    return min([available, *(max(0, limit - used) for limit, used in _read_cgroups())])


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one process of an engine."""

    pid: int
    name: str
    pss_bytes: int
    peak_rss_bytes: int
    gpu_bytes: int | None = None


class EngineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of an engine's processes together.

    Attributes:
        pss_bytes: counts a page that several of them share once.
        peak_rss_bytes: the peaks of different processes need not have coincided, so their sum is an upper bound.
        gpu_bytes: None where NVML does not answer.
    """

    processes: tuple[ProcessMemory, ...]
    pss_bytes: int
    peak_rss_bytes: int
    gpu_bytes: int | None = None


def process_memory(pids: Iterable[int]) -> EngineMemory:
    """Memory of each process of one engine, and the totals; those that are gone are left out."""
    gpu_bytes = _read_gpu_bytes()
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            processes.append(_read_process(pid, gpu_bytes))
    return EngineMemory(
        processes=tuple(processes),
        pss_bytes=sum(process.pss_bytes for process in processes),
        peak_rss_bytes=sum(process.peak_rss_bytes for process in processes),
        gpu_bytes=None if gpu_bytes is None else sum(process.gpu_bytes or 0 for process in processes),
    )


def _read_process(pid: int, gpu_bytes: dict[int, int] | None) -> ProcessMemory:
    process = psutil.Process(pid)
    command = process.cmdline()
    return ProcessMemory(
        pid=pid,
        name=_name_process(command) or process.name(),
        pss_bytes=_read_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:"),
        peak_rss_bytes=_read_field(Path(f"/proc/{pid}/status"), "VmHWM:"),
        gpu_bytes=None if gpu_bytes is None else gpu_bytes.get(pid, 0),
    )


def _name_process(command: list[str]) -> str | None:
    """vLLM titles its children "VLLM::…"; the API server and Python's resource tracker are known by their command."""
    line = " ".join(command)
    if "VLLM::" in line:
        return line.partition("VLLM::")[2].strip()
    if "resource_tracker" in line:
        return "resource_tracker"
    return "APIServer" if "api_server" in line else None


def _read_field(path: Path, field: str) -> int:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * KIB
    raise OSError(f"{path}: expected a line {field}, got none")


def _read_gpu_bytes() -> dict[int, int] | None:
    """Bytes per process id, summed over all GPUs, or None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    usage: dict[int, int] = {}
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                usage[process.pid] = usage.get(process.pid, 0) + (process.usedGpuMemory or 0)
    finally:
        pynvml.nvmlShutdown()
    return usage


def _read_cgroups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of every memory cgroup that limits this process.

    Both the process's own group and the root of the mount are read: inside a container with a cgroup namespace they
    are the same, without one the container's limit may be visible at either.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            base = root
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        else:
            continue
        for folder in {base, base / group.lstrip("/")}:
            limits.extend(_read_cgroup(folder, *files))
    return limits


def _read_cgroup(folder: Path, limit_file: str, usage_file: str, inactive_field: str) -> list[tuple[int, int]]:
    try:
        limit_text = (folder / limit_file).read_text(encoding="utf-8").strip()
        usage = int((folder / usage_file).read_text(encoding="utf-8"))
        stat = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    if limit_text == "max" or int(limit_text) >= NO_LIMIT_BYTES:
        return []
    inactive = sum(int(line.split()[1]) for line in stat if line.startswith(f"{inactive_field} "))
    return [(int(limit_text), max(0, usage - inactive))]
