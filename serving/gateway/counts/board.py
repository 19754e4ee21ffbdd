"""Numbers that several processes see: in memory that they inherit, behind one lock.

Each row is somebody's (a key, an engine, a queue) by name. It has numbers that all write, and for each worker some that
only this one writes: of a worker that dies they are taken back, by whoever notices. The lock is the kernel's (fcntl),
which frees it when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator

SHARED, OWN = 8, 4
# For keys, models and engines of all configurations since the start: at least so many, and so many times the first's.
ROWS, SPARE = 1 << 13, 4
NAME_BYTES = 16
DOUBLE = struct.calcsize("d")


class BoardFullError(Exception):
    """More names than there are rows."""


def find_rows(names: int) -> int:
    """Find how many rows there are to be for a configuration with so many names, and those that follow it."""
    return max(ROWS, SPARE * names)


class Board:
    """The memory, of which `numbers` are all; `worker` is which one this process is.

    A row's `SHARED` numbers begin where `find_row` says; each worker's `OWN` follow.
    """

    def __init__(self, workers: int, rows: int = ROWS) -> None:
        self.workers, self.worker, self._rows = workers, 0, rows
        self._stride = NAME_BYTES // DOUBLE + SHARED + OWN * workers
        size = rows * self._stride * DOUBLE
        self._file = os.memfd_create("laguna-gateway")
        os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)
        self.numbers = memoryview(self._memory).cast("d")

    def close(self) -> None:
        """Let the memory go, in this process."""
        self.numbers.release()
        self._memory.close()
        os.close(self._file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until nobody else changes anything, and keep it so; not twice, and nothing may wait inside."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def find_row(self, name: str) -> int:
        """Find where a name's row begins; the same in all processes. Raises BoardFullError."""
        digest = _digest(name)
        first = int.from_bytes(digest[:8], "little") % self._rows
        with self.locked():
            for i in range(self._rows):
                begin = (first + i) % self._rows * self._stride * DOUBLE
                known = self._memory[begin : begin + NAME_BYTES]
                if known == bytes(NAME_BYTES):
                    self._memory[begin : begin + NAME_BYTES] = digest
                elif known != digest:
                    continue
                return (begin + NAME_BYTES) // DOUBLE
        raise self._refuse()

    def check_room(self, names: Iterable[str]) -> None:
        """Check that there are rows for all of these names, beside those that were given. Raises BoardFullError."""
        starts = range(0, self._rows * self._stride * DOUBLE, self._stride * DOUBLE)
        with self.locked():
            given = {self._memory[start : start + NAME_BYTES] for start in starts} - {bytes(NAME_BYTES)}
        new = {_digest(name) for name in names} - given
        if len(given) + len(new) > self._rows:
            raise self._refuse()

    def find_own(self, row: int) -> int:
        """Find where this worker's numbers of a row begin."""
        return self.find_place(row, self.worker)

    def list_others(self, row: int) -> list[int]:
        """List where the other workers' begin."""
        return [self.find_place(row, worker) for worker in range(self.workers) if worker != self.worker]

    def _refuse(self) -> BoardFullError:
        most = f"at most {self._rows} names of keys, models and engines since the start"
        return BoardFullError(f"expected {most}, got more; start the gateway anew")

    @staticmethod
    def find_place(row: int, worker: int) -> int:
        """Find where a worker's numbers of a row begin."""
        return row + SHARED + worker * OWN

    def forget(self, worker: int) -> None:
        """Take back what a worker that has died held."""
        with self.locked():
            for i in range(self._rows):
                begin = i * self._stride
                if self._memory[begin * DOUBLE : begin * DOUBLE + NAME_BYTES] != bytes(NAME_BYTES):
                    own = self.find_place(begin + NAME_BYTES // DOUBLE, worker)
                    for j in range(own, own + OWN):
                        self.numbers[j] = 0.0


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=NAME_BYTES).digest()
