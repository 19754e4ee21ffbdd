"""An engine's log as a file that may fail: the disk fills up, somebody deletes it, it grows for months.

None of that may end or block the engine, so vLLM writes to a pipe and its supervisor (reaper.py) to the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

# A log that has grown beyond this is moved aside, and so many earlier ones are kept: PATH.1 is the youngest.
MAX_BYTES = 64 << 20
KEPT = 5


class LogWriter:
    """Appends to a file. What cannot be written is dropped; `report` gets a line once, and when it works again."""

    def __init__(self, path: Path, report: Callable[[str], None], *, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._report, self._max_bytes = path, report, max_bytes
        self._fd: int | None = None
        self._lost: int | None = None

    def write(self, data: bytes) -> None:
        """All of it, or as much as there is room for; never raises an OSError."""
        try:
            descriptor = self._open()
            if self._lost is not None:
                _write_all(descriptor, f"[{self._lost} bytes of this log were lost]\n".encode())
            _write_all(descriptor, data)
        except OSError as error:
            if self._lost is None:
                reason = f"expected to append to it, got {error.strerror or error}"
                remedy = "the engine goes on, and its lines are lost until there is room"
                self._report(f"log {self._path}: {reason}; {remedy}")
            self._lost = (self._lost or 0) + len(data)
            return
        if self._lost is not None:
            self._report(f"log {self._path}: written again, {self._lost} bytes were lost")
            self._lost = None

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        """Open the descriptor of the file that now has the path: a deleted or full one is left for a new one."""
        if self._fd is not None:
            held = os.fstat(self._fd)
            if stat.S_ISREG(held.st_mode):
                with contextlib.suppress(OSError):
                    named = os.stat(self._path)
                    if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):
                        if held.st_size < self._max_bytes:
                            return self._fd
                        rotate(self._path)
                self.close()
            else:
                return self._fd
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return self._fd


def rotate(path: Path, kept: int = KEPT) -> None:
    """Move a log aside to PATH.1, an earlier one to PATH.2, and so on; the oldest goes. A device or a pipe stays.

    Raises:
        OSError: a file could not be moved.
    """
    if not path.is_file():
        return
    for number in range(kept - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            _number(path, number).replace(_number(path, number + 1))
    path.replace(_number(path, 1))


def _number(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
