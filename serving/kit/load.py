"""How much processor time others took while something ran: a figure measured beside other load is off, and says so."""

from __future__ import annotations

import contextlib
import os
import time

import psutil

# Of all processors together. Above it a benchmark warns.
MOST_SHARE = 0.1
# Shorter runs are not judged: the kernel counts in ticks of 10 ms.
LEAST_S = 1.0


class OtherLoad:
    """Watches from its making on. What this process and its descendants use is its own."""

    def __init__(self) -> None:
        self._started_s, self._busy_s, self._own_s = time.monotonic(), read_busy_s(), read_own_s()

    def find_share(self) -> float | None:
        """The others' share of all processors' time so far, 0 to 1; None after less than LEAST_S."""
        wall_s = time.monotonic() - self._started_s
        if wall_s < LEAST_S:
            return None
        others_s = (read_busy_s() - self._busy_s) - (read_own_s() - self._own_s)
        return min(1.0, max(0.0, others_s / (wall_s * (os.cpu_count() or 1))))

    def describe(self) -> str | None:
        """A warning for people, where the share is above MOST_SHARE."""
        share = self.find_share()
        if share is None or share <= MOST_SHARE:
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
    """Seconds that this process, what it waited for, and its living descendants have worked."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
