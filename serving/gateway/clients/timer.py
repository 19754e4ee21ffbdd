"""A timer that is moved on instead of set anew.

Setting and cancelling one per request costs more than looking in vain now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# What a connection may await.
NOTHING, HEAD, BODY, NEXT = range(4)


class LazyTimer:
    """Calls `act` when the time last given to `start` is over, unless `stop` comes first; one at a time."""

    __slots__ = ("_act", "_due_s", "_handle", "_looks_s", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
        self._loop = loop
        self._act: Callable[[], None] | None = act
        self._handle: asyncio.TimerHandle | None = None
        self._due_s: float | None = None
        self._looks_s = 0.0

    def start(self, delay_s: float) -> None:
        """From now on, in place of what was set before."""
        self._due_s = due_s = self._loop.time() + delay_s
        if self._handle is None or due_s < self._looks_s:
            self._look_at(due_s)

    def stop(self) -> None:
        """Nothing is due any more."""
        self._due_s = None

    def close(self) -> None:
        """For good: nothing of it stays with the event loop, and it keeps nobody."""
        self._due_s = self._act = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look_at(self, when_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._looks_s, self._handle = when_s, self._loop.call_at(when_s, self._look)

    def _look(self) -> None:
        self._handle = None
        if self._due_s is None:
            return
        if self._due_s > self._loop.time():
            self._look_at(self._due_s)
        else:
            self._due_s = None
            if self._act is not None:
                self._act()


class AwaitTimer(LazyTimer):
    """A timer for what a connection awaits, counted from where its waiting began."""

    __slots__ = ("awaited",)

    def __init__(self, loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
        super().__init__(loop, act)
        self.awaited = NOTHING

    def expect(self, awaited: int, within_s: float) -> None:
        """Await this from now on, if it is not what is awaited already."""
        if awaited != self.awaited:
            self.awaited = awaited
            if awaited == NOTHING:
                self.stop()
            else:
                self.start(within_s)

    def take(self) -> int:
        """Return what was awaited; nothing is from now on."""
        awaited, self.awaited = self.awaited, NOTHING
        return awaited
