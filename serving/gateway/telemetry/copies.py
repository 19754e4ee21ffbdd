"""Copies of answers, for traces and for shadows: bounded, each of them and all together.

Where a copy would be larger it is dropped, and whoever wanted it is told; the answer itself goes on to its client.
"""

from __future__ import annotations

import asyncio
from enum import Enum

# Of all answers under way.
MOST_TOGETHER_BYTES = 256 << 20


class Dropped(Enum):
    """Why there is no copy of an answer."""

    TOO_LARGE = "too_large"
    BUSY = "busy"


# A body that is whole; None: there is no such answer.
Copied = bytes | Dropped | None


class Copies:
    """Those of a gateway's answers under way, by their bytes."""

    def __init__(self) -> None:
        self.held = 0


class Copy:
    """The copy of one answer, for as many as ask for it, each with the most bytes that it takes."""

    __slots__ = ("_copies", "_data", "_least", "_takers")

    def __init__(self, copies: Copies) -> None:
        self._copies, self._data = copies, bytearray()
        self._takers: list[tuple[int, asyncio.Future[Copied]]] = []
        # What all takers take.
        self._least = 0

    def keep(self, most: int) -> asyncio.Future[Copied]:
        """Keep the answer until it has ended, or has more bytes than that."""
        future: asyncio.Future[Copied] = asyncio.get_running_loop().create_future()
        self._takers.append((most, future))
        self._least = min(taker[0] for taker in self._takers)
        return future

    def add(self, data: bytes) -> None:
        """Add a piece of the answer, if anybody still wants it."""
        size = len(self._data) + len(data)
        if self._takers and size > self._least:
            self._tell(Dropped.TOO_LARGE, size - 1)
        if self._takers and self._copies.held + len(data) > MOST_TOGETHER_BYTES:
            self._tell(Dropped.BUSY)
        if self._takers:
            self._data += data
            self._copies.held += len(data)

    def end(self, *, whole: bool) -> None:
        """Hand the answer over, which has ended; None if it is not whole."""
        self._tell(bytes(self._data) if whole and self._takers else None)

    def _tell(self, copied: Copied, most: int | None = None) -> None:
        """Tell all takers, or those that take at most so many bytes; nothing is kept for nobody."""
        told = [taker for taker in self._takers if most is None or taker[0] <= most]
        self._takers = [taker for taker in self._takers if taker not in told]
        if self._takers:
            self._least = min(taker[0] for taker in self._takers)
        else:
            self._copies.held -= len(self._data)
            self._data = bytearray()
        for _, future in told:
            if not future.done():
                future.set_result(copied)
