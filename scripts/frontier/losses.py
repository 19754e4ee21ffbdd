"""Losses of one text under every mask, kept as they come: what is in the journal is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import ExpertShape
from laguna_serve.scripts.frontier.masks import Mask
from laguna_serve.scripts.text.rows import TextRows
from laguna_serve.scripts.training.pruning.changes import changed
from laguna_serve.scripts.training.pruning.losses import mean_loss
from laguna_serve.serving.kit.journal import KeyedJournal
from laguna_serve.serving.kit.progress import Progress

UNPRUNED = "unpruned"


class MeasuredPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the journal: summed loss of every row, in nats, of a mask in a format."""

    format: str
    digest: str
    label: str
    nats: tuple[float, ...]


class Meter:
    """Measures what its journal lacks."""

    def __init__(self, text: TextRows, shape: ExpertShape, path: Path) -> None:
        """Read the journal. Raises JournalError."""
        self.text, self._shape = text, shape
        self.targets = np.array([int(scored.sum()) for scored in text.scored])
        self._progress = Progress()
        self._journal = KeyedJournal(path, MeasuredPoint, lambda one: (one.format, one.digest), self._progress.say)

    def list_missing(self, stored: str, masks: Sequence[Mask]) -> dict[str, Mask | None]:
        """Digest → mask of what is not yet measured in that format; the unpruned model is None."""
        wanted: dict[str, Mask | None] = {UNPRUNED: None, **{mask.digest: mask for mask in masks}}
        return {digest: mask for digest, mask in wanted.items() if (stored, digest) not in self._journal.by_key}

    def begin(self, missing: int) -> None:
        """Say how much there is to measure; the time that is left counts from here."""
        self._total, self._rows_done = missing * len(self.text.rows), 0
        if missing and self._journal.by_key:
            self._progress.say(f"continues: {len(self._journal.by_key)} losses are there, {missing} are missing")
        self._progress.begin()

    def measure(self, model: Any, stored: str, missing: dict[str, Mask | None]) -> None:
        """Measure masks of the model, whose weights are in that format."""
        for digest, mask in missing.items():
            label = UNPRUNED if mask is None else f"{mask.name} {mask.ratio:.0%}"
            if mask is None:
                nats = self._measure(model, f"{stored} {label}")
            else:
                with changed(model, self._shape, mask.change):
                    nats = self._measure(model, f"{stored} {label}")
            self._journal.add(MeasuredPoint(format=stored, digest=digest, label=label, nats=tuple(nats.tolist())))

    def read(self, stored: str, mask: Mask | None) -> npt.NDArray[np.float64]:
        """[R]: summed loss of each row, in nats, which is there by now."""
        return np.array(self._journal.by_key[stored, UNPRUNED if mask is None else mask.digest].nats)

    def _measure(self, model: Any, label: str) -> npt.NDArray[np.float64]:
        means = []
        for row, scored in zip(self.text.rows, self.text.scored, strict=True):
            means.append(mean_loss(model, [row], [scored]))
            self._rows_done += 1
            self._progress.step(label, self._rows_done, self._total)
        nats: npt.NDArray[np.float64] = np.array(means) * self.targets
        return nats
