"""What was used under every key today, kept in a file so that a restart gives no budget back.

The file is SQLite's: each write is one transaction that adds what has come together since the last one, so that the
file is whole at every moment, two gateways may share it, and a crash loses at most what one interval has. Where a write
fails the numbers wait for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.access.limits import DAY_S

# Of days on which something was used: one that a clock gone wrong began takes no other's place but one.
KEPT_DAYS = 400
BUSY_S = 5.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day INTEGER NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, refused INTEGER NOT NULL,
    PRIMARY KEY (day, key, model)
) WITHOUT ROWID
"""
FORGET = """
DELETE FROM usage WHERE day < (SELECT day FROM usage GROUP BY day ORDER BY day DESC LIMIT 1 OFFSET ?)
"""
ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    output_tokens = output_tokens + excluded.output_tokens, refused = refused + excluded.refused
"""
READ = "SELECT key, model, requests, prompt_tokens, output_tokens, refused FROM usage WHERE day = ?"
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What was used: requests that an engine had, their tokens, and requests that were refused."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    refused: int = 0

    def add(self, other: Tally, sign: int = 1) -> None:
        """Add another one's, or with -1 subtract them."""
        self.requests += sign * other.requests
        self.prompt_tokens += sign * other.prompt_tokens
        self.output_tokens += sign * other.output_tokens
        self.refused += sign * other.refused


Row = tuple[int, str, str]


class Ledger:
    """The numbers of today, and those that are not in the file yet. Days are counted from the epoch, in UTC."""

    def __init__(self, path: Path | None = None, wall: Callable[[], float] = time.time) -> None:
        """Open the file, if one is given, and read what it has of today. Raises EngineError: it is none of ours."""
        self._day = int(wall() // DAY_S)
        self._path, self._file = path, None if path is None else _open(path, self._day)
        # What is still to be written, and what of today's has been, or is.
        self._pending: dict[Row, Tally] = {}
        self._lock = asyncio.Lock()
        self._written: dict[Row, Tally] = {}
        self._today: dict[str, dict[str, Tally]] = {}
        self._failing = False
        self._begin(self._day, {} if self._file is None else _read(self._file, self._day))

    def find(self, day: int, key: str) -> Mapping[str, Tally]:
        """Find what a key has used on the day that is today, by model ("" where none was known)."""
        self._turn(day)
        return self._today.get(key, {})

    def sum_tokens(self, day: int, key: str) -> int:
        """Sum what a key has used on the day that is today, over all models."""
        return sum(tally.prompt_tokens + tally.output_tokens for tally in self.find(day, key).values())

    def find_row(self, day: int, key: str, model: str) -> Tally:
        """Find what a key has used of a model on the day that is today: whoever uses more adds to it."""
        self._turn(day)
        return self._today.setdefault(key, {}).setdefault(model, Tally())

    def find_unwritten(self, key: str) -> dict[str, Tally]:
        """Find what of today's use of a key is not in the file: all of it where there is no file."""
        found = {}
        for model, tally in self._today.get(key, {}).items():
            row = (self._day, key, model)
            found[model] = replace(tally)
            found[model].add(self._written.get(row, Tally()), -1)
            found[model].add(self._pending.get(row, Tally()))
        return found

    def read_written(self) -> dict[str, dict[str, Tally]]:
        """Read what the file has of today by key and model, whoever wrote it; nothing where it cannot be read."""
        if self._path is not None:
            # On a connection of its own, which does not see what is being written.
            with (
                contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
                contextlib.closing(sqlite3.connect(self._path)) as file,
            ):
                return _read(file, self._day)
        return {}

    async def keep_writing(self, every_s: float, stopped: asyncio.Event) -> None:
        """Write what comes together, until it is stopped; then write the rest, and close the file."""
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await stopped.wait()
            await self.write()
        self.close()

    async def write(self) -> None:
        """Add to the file what is not in it yet, in a thread: a disk may be slow. A failure is logged once."""
        async with self._lock:
            await self._write()

    async def _write(self) -> None:
        self._collect()
        rows, self._pending = self._pending, {}
        if self._file is None or not rows:
            return
        try:
            await asyncio.to_thread(_add, self._file, rows)
        except sqlite3.Error as error:
            for (day, key, model), tally in rows.items():
                self._pending.setdefault((day, key, model), Tally()).add(tally)
            if not self._failing:
                logger.error("usage_file %s: expected to write it, got %s; it is tried again", self._path, error)
            self._failing = True
        else:
            if self._failing:
                logger.info("usage_file %s: written again", self._path)
            self._failing = False

    def close(self) -> None:
        """Close the file; what is not written yet is lost."""
        if self._file is not None:
            self._file.close()

    def _turn(self, day: int) -> None:
        """Begin a day: with what the file has of it, where the clock was set and it has been before."""
        if day == self._day:
            return
        self._collect()
        self._day = day
        today = self.read_written()
        for (pending_day, key, model), tally in self._pending.items():
            if pending_day == day:
                today.setdefault(key, {}).setdefault(model, Tally()).add(tally)
        self._begin(day, today)

    def _begin(self, day: int, today: dict[str, dict[str, Tally]]) -> None:
        """Begin a day of which so much is in the file already, or will be."""
        self._today, self._written = today, {}
        for key, models in today.items():
            self._written |= {(day, key, model): replace(tally) for model, tally in models.items()}

    def _collect(self) -> None:
        """Collect what has come since the last time."""
        if self._file is None:
            return
        for key, models in self._today.items():
            for model, tally in models.items():
                row = (self._day, key, model)
                written = self._written.setdefault(row, Tally())
                if tally != written:
                    more = self._pending.setdefault(row, Tally())
                    more.add(tally)
                    more.add(written, -1)
                    self._written[row] = replace(tally)


def _open(path: Path, today: int) -> sqlite3.Connection:
    file = None
    try:
        file = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        with file:
            file.execute(SCHEMA)
            file.execute(FORGET, (KEPT_DAYS - 1,))
            _read(file, today)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if file is not None:
            file.close()
        expected = "expected a file of usage that can be written"
        raise EngineError(f"usage_file {path}: {expected}, got {error}; name another one, or move it away") from None
    return file


def _read(file: sqlite3.Connection, day: int) -> dict[str, dict[str, Tally]]:
    """Read a day by key and model. Raises sqlite3.Error, UnicodeDecodeError."""
    found: dict[str, dict[str, Tally]] = {}
    for key, model, *numbers in file.execute(READ, (day,)):
        found.setdefault(key, {})[model] = Tally(*numbers)
    return found


def _add(file: sqlite3.Connection, rows: Mapping[Row, Tally]) -> None:
    """Add all rows, or none of them."""
    with file:
        file.executemany(
            ADD, [(*row, t.requests, t.prompt_tokens, t.output_tokens, t.refused) for row, t in rows.items()]
        )
