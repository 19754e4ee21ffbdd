"""The queue of a model: who waits for a slot, by priority and then in the order in which they came."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

# A priority, of which the smaller goes first, and a number by which one that looked in vain keeps its place.
Ticket = tuple[int, int]


@dataclass(slots=True, eq=False)
class WaitingLine:
    """Those who wait; there are `length` of them, `limited` of whom cannot take every slot."""

    length: int = 0
    limited: int = 0
    _tickets: Iterator[int] = field(default_factory=itertools.count)
    _entries: list[tuple[int, int, asyncio.Future[None]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether somebody may be woken."""
        return bool(self._entries)

    def count(self, *, limited: bool) -> int:
        """Count those who wait and are limited, or are not."""
        return self.limited if limited else self.length - self.limited

    @contextlib.contextmanager
    def draw(self, priority: int, *, limited: bool) -> Iterator[Ticket]:
        """Give a place at the end of those of a priority, for as long as the block runs."""
        self.length += 1
        self.limited += limited
        try:
            yield priority, next(self._tickets)
        finally:
            self.length -= 1
            self.limited -= limited

    async def wait(self, ticket: Ticket, timeout_s: float, *, nudge: bool = False) -> None:
        """Return when woken. With `nudge` the first one looks again now. Raises TimeoutError."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._entries, (*ticket, future))
        if nudge:
            self.wake()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except (TimeoutError, asyncio.CancelledError):
            if future.done() and not future.cancelled():
                self.wake()  # woken and ended at once: the turn is the next one's
            raise
        finally:
            future.cancel()
            if len(self._entries) > 2 * self.length + 64:  # mostly of those who have left
                self._entries = [entry for entry in self._entries if not entry[2].done()]
                heapq.heapify(self._entries)

    def wake(self) -> None:
        """Let the first one look again."""
        while self._entries:
            _, _, future = heapq.heappop(self._entries)
            if not future.done():
                future.set_result(None)
                return

    def wake_behind(self, ticket: Ticket) -> None:
        """Let the next one behind a ticket look again: each passes it on to a later one, and so to an end."""
        behind = (entry for entry in self._entries if entry[:2] > ticket and not entry[2].done())
        if (entry := min(behind, default=None)) is not None:
            self._entries.remove(entry)  # it may come back under the same ticket
            heapq.heapify(self._entries)
            entry[2].set_result(None)

    def wake_all(self) -> None:
        """Let everybody look again."""
        for _ in range(len(self._entries)):
            self.wake()
