"""The file of traces: SQLite's, whole at every moment, and never much larger than it may be.

Token ids are little-endian int32, log-probabilities float32; no text and no key is in it. When the file has reached its
size the oldest rows go, and their pages are used again.
"""

from __future__ import annotations

import array
import contextlib
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from laguna_serve.serving.kit.errors import CommandError

BUSY_S = 5.0
# Of all rows, at a time: the file is not rewritten for every one.
DROPPED_SHARE = 0.1
COLUMNS = (
    "time REAL NOT NULL",
    "request_id TEXT NOT NULL",
    "choice INTEGER NOT NULL",
    "key TEXT",
    "model TEXT NOT NULL",
    "engine TEXT NOT NULL",
    "weight_versions TEXT NOT NULL",
    "draft_versions TEXT NOT NULL",
    "temperature REAL",
    "seed INTEGER",
    "finish_reason TEXT",
    "first_token_s REAL",
    "total_s REAL NOT NULL",
    "prompt_token_ids BLOB NOT NULL",
    "token_ids BLOB NOT NULL",
    "logprobs BLOB",
    "routed_experts TEXT",
    "speculation TEXT",
)
NAMES = tuple(column.partition(" ")[0] for column in COLUMNS)
COUNT = """
SELECT model, weight_versions, draft_versions, coalesce(key, ''), count(*), sum(length(prompt_token_ids)) / 4,
    sum(length(token_ids)) / 4, min(time), max(time)
FROM traces WHERE {} GROUP BY 1, 2, 3, 4 ORDER BY min(rowid)
"""
MARK = 0x1A60  # "laguna": PRAGMA user_version of files that are ours


class TraceFileError(CommandError, RuntimeError):
    """A file of traces that cannot be used, as one line."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One answer.

    Attributes:
        time: when it ended, in seconds since 1970.
        choice: its place among the answers to one request.
        key: the name of whose request it was; None where nobody needs a key.
        weight_versions, draft_versions: that it ran under, one after the other; more than one where an update came.
        temperature: as the request said, else its engine's own default; None where that is not known.
        first_token_s, total_s: from the request's arrival at the gateway.
        logprobs: of its tokens, nats; None where they were not asked for.
        routed_experts: as the engine gave them (serving/client/routed_experts.py).
        speculation: what vLLM says of its drafts, JSON.
    """

    time: float
    request_id: str
    choice: int
    key: str | None
    model: str
    engine: str
    weight_versions: tuple[str, ...]
    draft_versions: tuple[str, ...]
    temperature: float | None
    seed: int | None
    finish_reason: str | None
    first_token_s: float | None
    total_s: float
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float] | None
    routed_experts: str | None
    speculation: str | None


class Group(NamedTuple):
    """Answers of one model, weights, drafter and key ("" without one); the times of the first and the last."""

    model: str
    weight_versions: str
    draft_versions: str
    key: str
    answers: int
    prompt_tokens: int
    tokens: int
    first: float
    last: float


class TraceFile:
    """One file, for one thread at a time."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        """Open it; with `max_bytes` it is made where it is not there. Raises TraceFileError."""
        self._path, self.max_bytes = path, max_bytes
        if max_bytes is None and not path.is_file():
            raise TraceFileError(f"{path}: expected a file of traces, got none; see traces.file in gateway.toml")
        file = None
        try:
            file = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
            (mark,) = file.execute("PRAGMA user_version").fetchone()
            (tables,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if mark != MARK and tables:
                raise sqlite3.DatabaseError("a database of something else")
            if max_bytes is not None:
                file.execute("PRAGMA journal_mode = WAL")
                with file:
                    file.execute(f"CREATE TABLE IF NOT EXISTS traces ({', '.join(COLUMNS)})")
                    file.execute(f"PRAGMA user_version = {MARK}")
                    _allow_no_temperature(file)
            elif mark != MARK:
                raise sqlite3.DatabaseError("an empty one")
        except sqlite3.Error as error:
            if file is not None:
                file.close()
            expected = "expected a file of traces"
            raise TraceFileError(f"{path}: {expected}, got {error}; name another one, or move it away") from None
        self._file = file

    def add(self, traces: Sequence[Trace]) -> int:
        """Add all of them, or none, and drop the oldest where the file is full. Returns how many were dropped.

        Raises:
            sqlite3.Error: the disk is full or fails.
        """
        holes = ", ".join("?" * len(NAMES))
        with self._file:
            self._file.executemany(f"INSERT INTO traces ({', '.join(NAMES)}) VALUES ({holes})", map(_to_row, traces))
        return self._make_room()

    def read(self, where: str = "1", values: Sequence[object] = ()) -> Iterator[Trace]:
        """Read those of an SQL condition, in the order in which they came."""
        try:
            yield from map(
                _from_row,
                self._file.execute(f"SELECT {', '.join(NAMES)} FROM traces WHERE {where} ORDER BY rowid", values),
            )
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._explain(error) from None

    def count(self, where: str = "1", values: Sequence[object] = ()) -> list[Group]:
        """Count those of an SQL condition, in the order in which their groups came; no token is read for it."""
        try:
            return [Group(*row) for row in self._file.execute(COUNT.format(where), values)]
        except (sqlite3.Error, ValueError) as error:
            raise self._explain(error) from None

    def close(self) -> None:
        """Close it; nothing is left beside the file."""
        with contextlib.suppress(sqlite3.Error):
            self._file.close()

    def _explain(self, error: Exception) -> TraceFileError:
        return TraceFileError(f"{self._path}: expected traces, got {error}; copy what is left with .recover")

    def _make_room(self) -> int:
        """Drop a share of the rows, the oldest, while the pages in use exceed the bound."""
        dropped = 0
        while self.max_bytes is not None and self._count_used_bytes() > self.max_bytes:
            (rows,) = self._file.execute("SELECT count(*) FROM traces").fetchone()
            if rows <= 1:
                break
            count = max(1, int(rows * DROPPED_SHARE))
            with self._file:
                oldest = "SELECT rowid FROM traces ORDER BY rowid LIMIT ?"
                self._file.execute(f"DELETE FROM traces WHERE rowid IN ({oldest})", (count,))
            dropped += count
        return dropped

    def _count_used_bytes(self) -> int:
        pages, free, size = (
            self._file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int(pages - free) * int(size)


def _allow_no_temperature(file: sqlite3.Connection) -> None:
    """Let a trace of an older file have no temperature.

    Its table is given other words, as https://www.sqlite.org/lang_altertable.html has it for a NOT NULL that goes:
    the rows, which may be a gigabyte, stay where they are.
    """
    columns = file.execute("SELECT name, type, \"notnull\" FROM pragma_table_info('traces')").fetchall()
    kind = {column: kind for column, kind, required in columns if required}.get("temperature")
    if kind is None:
        return
    (version,) = file.execute("PRAGMA schema_version").fetchone()
    file.execute("PRAGMA writable_schema = ON")
    words = (f"temperature {kind} NOT NULL", f"temperature {kind}")
    file.execute("UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = 'traces'", words)
    file.execute(f"PRAGMA schema_version = {version + 1}")
    file.execute("PRAGMA writable_schema = OFF")


def _to_row(trace: Trace) -> tuple[object, ...]:
    values = msgspec.structs.asdict(trace)
    for name in ("weight_versions", "draft_versions"):
        values[name] = ", ".join(values[name])
    for name in ("prompt_token_ids", "token_ids"):
        values[name] = _pack("i", values[name])
    values["logprobs"] = None if trace.logprobs is None else _pack("f", trace.logprobs)
    return tuple(values[name] for name in NAMES)


def _from_row(row: tuple[object, ...]) -> Trace:
    values = dict(zip(NAMES, row, strict=True))
    for name in ("weight_versions", "draft_versions"):
        values[name] = tuple(str(values[name]).split(", "))
    for name in ("prompt_token_ids", "token_ids"):
        values[name] = _unpack("i", values[name])
    values["logprobs"] = None if values["logprobs"] is None else _unpack("f", values["logprobs"])
    return msgspec.convert(values, Trace)


def _pack(kind: str, numbers: Iterable[float]) -> bytes:
    packed = array.array(kind, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(kind: str, data: object) -> Sequence[float]:
    if not isinstance(data, bytes):
        raise TypeError(f"{data!r} for a list of numbers")
    packed = array.array(kind, data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
