"""The rows that are scored so far, in a journal, so that a measurement continues where it was stopped."""

from __future__ import annotations

from pathlib import Path

import msgspec

from laguna_serve.evals.perplexity.rows import Row
from laguna_serve.serving.kit.journal import Journal


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """A row's loss on disk: its number, and `tokens`, how many of them are in the sum."""

    row: int
    document: int
    tokens: int
    nats: float


class ScoredRows:
    """`nats`: the summed loss of every scored row, by its number."""

    def __init__(self, path: Path) -> None:
        """Read those that are there. Raises JournalError."""
        self._journal = Journal(path, _Line)
        self.nats = {line.row: line.nats for line in self._journal.entries}

    def add(self, number: int, row: Row, nats: float) -> None:
        """File a row's loss; it is with the system when this returns."""
        self._journal.append(_Line(row=number, document=row.document, tokens=row.scored, nats=nats))
        self.nats[number] = nats
