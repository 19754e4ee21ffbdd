"""Requests begin one by one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """Lets one request begin per turn of the event loop.

    So of many that come at once the first has its answer before the last is read, and streams go on in between.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._taken = False

    def take(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Is this turn of the loop free? It is taken by that."""
        if self._taken:
            return False
        self._taken = True
        loop.call_soon(self._go_on, loop)
        return True

    def wait(self, begin: Callable[[], None]) -> None:
        """Call `begin` in a later turn: others were before, and this one is taken."""
        self._waiting.append(begin)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._taken = bool(self._waiting)
        if self._taken:
            loop.call_soon(self._go_on, loop)
            self._waiting.popleft()()
