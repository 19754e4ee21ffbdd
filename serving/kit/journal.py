"""A journal: one JSON object per line, added as answers come, so that a measurement goes on where it was stopped.

One rule for lines that were cut off in writing: the last one is dropped, and said to be; in the middle of a file, where
no interruption leaves one, it is an error that names the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import explain_write
from laguna_serve.serving.kit.progress import say

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class JournalError(CommandError, ValueError):
    """A journal with a line that cannot be read, or that another command writes to."""


class Journal(Generic[T]):
    """One journal's file. Not for several processes at once: the second one that writes is told so.

    Attributes:
        entries: what the file held, in order, and what was added since.
    """

    def __init__(self, path: Path, kind: type[T], say: Callable[[str], None] = say) -> None:
        """Read the file, if there is one. `kind`: a line's type, for msgspec; `say` reports a line that is dropped.

        Raises:
            JournalError: a line that is whole is no such entry.
            OSError: the file cannot be read, or its cut-off line not be dropped.
        """
        self._path = path
        self._size = 0
        self.entries: list[T] = []
        if not path.exists():
            return
        with path.open("rb") as file:  # line by line: it may have gigabytes
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    say(f"{path}: the last line was cut off in writing ({len(line)} bytes): dropped")
                    os.truncate(path, self._size)
                    break
                self.entries.append(self._decode(number, line[:-1], kind))
                self._size += len(line)

    def append(self, entry: T) -> None:
        """Add an entry; it is with the system when this returns.

        Raises:
            JournalError: another process has written since.
            WriteError: the file cannot be written.
        """
        # ASCII: an answer may hold half a surrogate pair, or line separators.
        line = json.dumps(msgspec.to_builtins(entry)).encode() + b"\n"
        try:
            with self._path.open("ab") as file:
                if file.tell() != self._size:
                    expected = "expected no other command to write here meanwhile"
                    raise JournalError(
                        f"{self._path}: {expected}, got its lines; wait for its end, then start this anew"
                    )
                file.write(line)
        except OSError as error:
            raise explain_write(self._path, error) from None
        self._size += len(line)
        self.entries.append(entry)

    def _decode(self, number: int, line: bytes, kind: type[T]) -> T:
        try:
            # Not msgspec's own decoder, which refuses half a surrogate pair.
            return msgspec.convert(json.loads(line), kind)
        except (ValueError, RecursionError) as error:
            expected = "expected a line of this journal"
            raise JournalError(f"{self._path}:{number}: {expected}, got one where {error}; remove it") from None


class KeyedJournal(Generic[K, T]):
    """A journal of which one entry counts for each key: in `by_key`, the latest."""

    def __init__(self, path: Path, kind: type[T], find_key: Callable[[T], K], say: Callable[[str], None] = say) -> None:
        """Read the file, if there is one. Raises JournalError, OSError."""
        self._journal = Journal(path, kind, say)
        self._find_key = find_key
        self.by_key: dict[K, T] = {find_key(entry): entry for entry in self._journal.entries}

    def add(self, entry: T) -> None:
        """Add an entry; it is with the system when this returns. Raises JournalError, WriteError."""
        self._journal.append(entry)
        self.by_key[self._find_key(entry)] = entry
