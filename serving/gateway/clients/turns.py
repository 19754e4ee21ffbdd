"""Requests begin one by one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """Lets one request begin per turn of the event loop, so that of many that come at once the first has its answer
    before the last is read, and streams go on in between."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._taken = False

    def enter(self, loop: asyncio.AbstractEventLoop, begin: Callable[[], None]) -> None:
        """Call `begin` now if this turn is free, or in a later one."""
        if self._taken:
            self._waiting.append(begin)
        else:
            self._taken = True
            loop.call_soon(self._go_on, loop)
            begin()

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._taken = bool(self._waiting)
        if self._taken:
            loop.call_soon(self._go_on, loop)
            self._waiting.popleft()()
