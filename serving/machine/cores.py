"""How many cores this process may use: by its affinity, and by the quota of the container that it runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_cores(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Count whole cores, one at least: on a machine of 128, `docker run --cpus 4` leaves 4 of them.

    More threads than that are stopped together for most of every period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _read_quotas(root, membership))]))


def _read_quotas(root: Path, membership: Path) -> Iterator[float]:
    """Read the cores' worth of time of every group that limits this process, in both versions of cgroups.

    Its own, those above it and the mount's, as a container may see its limit at any of them.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = base.joinpath(*parts[:depth])
            quota = _read_v1(folder) if controllers else _read_v2(folder)
            if quota is not None:
                yield quota


def _read_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # none, or "max"
        return None


def _read_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return quota / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8")) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
