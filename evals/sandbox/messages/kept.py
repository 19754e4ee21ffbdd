"""Arguments that the other side has kept: a generator goes on filling the caller's list, an object writes a log of it.

Arguments are copies over there. One that is still referred to when its call has ended is *kept*: both sides number it
alike, and from then on each message tells what has become of it, so that either copy follows the other. That holds for
containers of plain values; what lies deeper is left as it was when the call ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import MalformedError, Node, describe
from laguna_serve.evals.sandbox.messages.making import MUTABLE

TAGS = frozenset(("list", "dict", "set", "odict", "counter", "defaultdict", "deque", "bytearray"))
PLAIN = frozenset((str, bool, type(None), float, int))
MAX_KEPT, MAX_ITEMS, SMALL_INT = 64, 10_000, 1 << 63


class Kept:
    """One side's objects of that kind, and what they were when they last crossed."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, str]] = []
        self._contents: list[Any] = []

    def add(self, value: Any, tag: str) -> None:
        """Follow an object from now on; its content is what crosses."""
        self._entries.append((value, tag))
        self._contents.append(_read(value, tag))

    def __len__(self) -> int:
        return len(self._entries)

    def list_changes(self) -> dict[str, Node]:
        """Those that are no longer what they were, and are plain."""
        changes: dict[str, Node] = {}
        for number, (value, tag) in enumerate(self._entries):
            now = _read(value, tag)
            if now is not None and not _is_same(now, self._contents[number]):
                changes[str(number)] = self._contents[number] = now
        return changes

    def take(self, changes: dict[str, Node], writes: bool = True) -> None:
        """Make them what they have become over there. `writes` False: only note that they are.

        Raises:
            MalformedError: no such content.
        """
        for number, (tag, extra, items) in changes.items():
            value, known = self._entries[int(number)]
            if tag != known or not set(map(type, items)) <= PLAIN:
                raise MalformedError("expected the content of an object that was kept")
            if writes:
                MUTABLE[tag][1](value, items, extra)
                self._contents[int(number)] = _read(value, tag)


def count_references(values: Iterable[Any]) -> list[int]:
    """How often each of some values is referred to; to be compared with another count of the same values."""
    return [sys.getrefcount(value) for value in values]


def _read(value: Any, tag: str) -> Node | None:
    if tag not in TAGS or len(value) > MAX_ITEMS:
        return None
    _, extra, items = describe(value, type(value))
    plain = set(map(type, items)) <= PLAIN
    if not plain or any(type(item) is int and not -SMALL_INT < item < SMALL_INT for item in items):
        return None
    return [tag, extra, items]


def _is_same(now: Node, before: Node | None) -> bool:
    return before is not None and now == before and list(map(type, now[2])) == list(map(type, before[2]))
