"""What processes have used."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def read_cpu_s(pids: Iterable[int]) -> float:
    """Processor time that these processes have used, in seconds; those that are gone are left out."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total
