"""A controlled clock: a mock says how long its answer took, and nobody waits."""

from __future__ import annotations

import asyncio
import contextlib

# Of a reader that has left.
PATIENCE_S = 5.0


class Clock:
    """Stands in the place of the module `time` where a program measures, and is moved on by the mocks that share it."""

    def __init__(self) -> None:
        self.now_s = 1.0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def expect_reading(self) -> asyncio.Event:
        """Set when the time is next read: a mock sends no more before what it sent has been stamped."""
        event = asyncio.Event()
        self._waiting.append((asyncio.get_running_loop(), event))
        return event

    async def wait(self, event: asyncio.Event) -> None:
        """Until the time was read, or the reader has left."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), PATIENCE_S)

    def perf_counter(self) -> float:
        return self.now_s

    def perf_counter_ns(self) -> int:
        now_ns = round(self.now_s * 1e9)
        waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # the mock has ended
                loop.call_soon_threadsafe(event.set)
        return now_ns
