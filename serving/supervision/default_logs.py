"""Logs in the user's cache: what they are called, and how many there may be where each process has its own."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from laguna_serve.serving.machine.cache import find_own_cache

# What a log was moved aside to (log_file.py).
OLDER = re.compile(r"\.\d+$")
# Of logs that are named by a process, which no later one overwrites.
KEPT_LOGS = 20
RAY, ANY_PORT = "ray-", "serve-pid-"


def find_serve_log(port: int) -> Path:
    """Find where `laguna serve` logs to: one file per port, which a later server on it overwrites.

    0 is any port: one file per process, and the oldest are deleted.
    """
    return find_own_cache() / f"serve-{port}.log" if port else _find_own_log(ANY_PORT, str(os.getpid()))


def find_replica_log(replica: str) -> Path:
    """Find where a replica's engine on Ray logs to; the oldest logs of others are deleted."""
    return _find_own_log(RAY, replica)


def _find_own_log(prefix: str, name: str) -> Path:
    drop_oldest(find_own_cache(), prefix)
    return find_own_cache() / f"{prefix}{name}.log"


def drop_oldest(folder: Path, prefix: str, kept: int = KEPT_LOGS) -> None:
    """Delete logs of that prefix but for so many that were written to last; what one was moved aside to goes with it.

    For logs with a name of their own per process. One whose process still runs is begun again when it is written to.
    """
    logs: dict[str, list[Path]] = {}
    for path in folder.glob(f"{prefix}*.log*"):
        logs.setdefault(OLDER.sub("", path.name), []).append(path)
    youngest = sorted(logs, key=lambda name: max(map(_find_time, logs[name])), reverse=True)
    for path in (path for name in youngest[kept:] for path in logs[name]):
        with contextlib.suppress(OSError):
            path.unlink()


def _find_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
