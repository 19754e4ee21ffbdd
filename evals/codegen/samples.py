"""One JSON Lines file with an entry per sample of a problem, written as they come, so that a run can be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Key = tuple[str, int]


class SampleLog:
    """Entries by (task_id, sample); a later one takes the place of an earlier one.

    A line that was cut off in writing is dropped. Not for several processes at once.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[Key, dict[str, Any]] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if self._read(line)]
            if whole != lines:
                path.write_text("".join(whole), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, key: Key, entry: Mapping[str, Any]) -> None:
        """File an entry; it is with the system when this returns."""
        self.entries[key] = dict(entry)
        # ASCII: an answer may hold half a surrogate pair, or line separators.
        self._file.write(json.dumps({"task_id": key[0], "sample": key[1], **entry}) + "\n")
        self._file.flush()

    def _read(self, line: str) -> bool:
        if not line.endswith("\n"):
            return False
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            entry = json.loads(line)
            self.entries[entry.pop("task_id"), entry.pop("sample")] = entry
            return True
        return False
