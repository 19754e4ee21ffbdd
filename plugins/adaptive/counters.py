"""Counts of drafted tokens per step and of time, from the engine's process into its server's /metrics.

vLLM's own counters hear of drafts alone: not how often none were made. The server makes a small file before it starts
the engine, which finds it by a variable, counts in it, and takes its name away; both then share the memory. Steps are
counted by drafted tokens per request, rounded.

    laguna:gamma_steps_total{drafted="0"}      steps without drafts
    laguna:gamma_seconds_total{drafted="0"}    time spent in them
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "LAGUNA_GAMMA_COUNTERS"
MOST = 64  # tokens per step that are told apart
PAIR = struct.Struct("dd")  # steps, seconds
SIZE = PAIR.size * MOST


class Counters:
    """Steps and seconds by drafted tokens per request, in memory that two processes share."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def add(self, drafted: int, requests: int, seconds: float) -> None:
        """Count a step of so many requests with so many drafted tokens together."""
        place = PAIR.size * min(round(drafted / requests), MOST - 1)
        steps, total = PAIR.unpack_from(self._memory, place)
        PAIR.pack_into(self._memory, place, steps + 1, total + seconds)

    def read(self) -> list[tuple[int, float, float]]:
        """List (drafted, steps, seconds) of what came up."""
        pairs = enumerate(PAIR.iter_unpack(self._memory[:SIZE]))
        return [(drafted, steps, seconds) for drafted, (steps, seconds) in pairs if steps]


def open_counters() -> Counters | None:
    """Open the server's counters in the engine's process; None where there are none."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        with Path(path).open("r+b") as file:
            counters = Counters(mmap.mmap(file.fileno(), SIZE))
    except (OSError, ValueError):
        return None
    with suppress(OSError):
        Path(path).unlink()
    return counters


def publish_counters() -> None:
    """Make the counters in the server's process, and have its /metrics show them; a second call changes nothing."""
    if os.environ.get(VARIABLE):
        return
    from prometheus_client import REGISTRY

    descriptor, path = tempfile.mkstemp(prefix="laguna-gamma-")
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate(SIZE)
        counters = Counters(mmap.mmap(file.fileno(), SIZE))
    os.environ[VARIABLE] = path
    REGISTRY.register(CounterCollector(counters))


class CounterCollector:
    """Shows the counters to Prometheus."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Any]:
        """Yield both families as they stand."""
        from prometheus_client.core import CounterMetricFamily

        steps = CounterMetricFamily(
            "laguna:gamma_steps", "Steps that read no prompt, by drafted tokens per request.", labels=["drafted"]
        )
        seconds = CounterMetricFamily("laguna:gamma_seconds", "Seconds in these steps.", labels=["drafted"])
        for drafted, count, total in self._counters.read():
            steps.add_metric([str(drafted)], count)
            seconds.add_metric([str(drafted)], total)
        yield steps
        yield seconds
