"""A drafter's context, kept up without the drafter: what the target computed waits, and is written in one pass.

A DFlash drafter attends to keys and values of its own, made of the target's hidden states.  In a step without drafts
they are not needed yet, and making them costs as much as a small model's prompts do by some percent.  So the hidden
states wait here with their positions and slots: those of a request that ends before anything is drafted are dropped,
the others written together, before the next pass of the drafter, before their blocks may be read through the prefix
cache, and when many wait.

Checked against vLLM 0.32.0 (`DFlashProposer.build_model_inputs_first_pass`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from laguna_serve.plugins.drafting.context import store_taps
from laguna_serve.plugins.repairs.row_counts import pad

# What may wait, in rows and in bytes of hidden states, of which at least so many rows.  What was dropped and is not
# cleared away yet comes on top: at most so many times as much.
MOST_ROWS, MOST_BYTES, LEAST_ROWS = 16384, 128 << 20, 512
MOST_DROPPED = 2
# Written rows after which what they took weighs a third.
MEMORY_ROWS = 1024.0


@dataclass(slots=True)
class _Step:
    """Rows of a step, the `number`-th: hidden states, positions, slots, and whose each is."""

    number: int
    states: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    owners: list[str]


class WaitingContext:
    """Rows of hidden states on their way into the drafter's part of the KV cache; `row_s`: what writing one takes."""

    def __init__(self) -> None:
        self.row_s = 0.0
        self._written = self._write_s = 0.0
        self._steps: list[_Step] = []
        self._number = 0
        self._rows: Counter[str] = Counter()
        # Of what was dropped: the last step whose rows went, by request, and how many are not cleared away yet.
        self._dropped: dict[str, int] = {}
        self._lost = 0

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return self._rows.total()

    @property
    def is_full(self) -> bool:
        """Whether they should be written, as too many wait."""
        if not self._steps:
            return False
        states = self._steps[0].states
        most = max(LEAST_ROWS, MOST_BYTES // (states.shape[1] * states.element_size()))
        return self.rows >= min(MOST_ROWS, most)

    def add(
        self,
        taps: Sequence[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        owners: list[str],
        kept: torch.Tensor | None,
    ) -> None:
        """Let a step's rows wait.

        taps: each [≥ rows, hidden]; positions and slots [rows], buffers of the runner that the next step overwrites;
        owners: the request of each row; kept: the rows that hold committed tokens, None for all.
        """
        rows = positions.shape[0]
        states = torch.cat([tap[:rows] for tap in taps], dim=-1)
        self._number += 1
        if kept is None:
            step = _Step(self._number, states, positions.clone(), slots.clone(), owners)
        else:
            step = _pick(_Step(self._number, states, positions, slots, owners), kept.tolist())
        self._steps.append(step)
        self._rows.update(step.owners)

    def drop(self, requests: Iterable[str]) -> None:
        """Forget the rows of requests that have ended, or begin anew.

        They are cleared away once they are twice as many as those that wait, which are copied for it.
        """
        for request in requests:
            if rows := self._rows.pop(request, 0):
                self._dropped[request] = self._number
                self._lost += rows
        if self._lost > max(LEAST_ROWS, MOST_DROPPED * self.rows):
            self._clear_away()

    def _clear_away(self) -> None:
        """Leave what was dropped out of the steps."""
        left = []
        for step in self._steps:
            kept = [row for row, owner in enumerate(step.owners) if self._dropped.get(owner, 0) < step.number]
            if len(kept) == len(step.owners):
                left.append(step)
            elif kept:
                left.append(_pick(step, kept))
        self._steps = left
        self._dropped.clear()
        self._lost = 0

    def write(self, model: Any) -> None:
        """Make keys and values of all rows with the drafter's model, and store them."""
        if self._lost:
            self._clear_away()
        if not self._steps:
            return
        begin, rows = perf_counter(), self.rows
        again = [_pick(self._steps[-1], [-1] * (pad(rows) - rows))]  # the last row, to a number that comes again
        states, positions, slots = (
            torch.cat([getattr(step, name) for step in self._steps + again])
            for name in ("states", "positions", "slots")
        )
        self._steps = []
        self._rows.clear()
        store_taps(model, states, positions, slots)
        keep = math.exp(-rows / MEMORY_ROWS)
        self._written, self._write_s = self._written * keep + rows, self._write_s * keep + perf_counter() - begin
        self.row_s = self._write_s / self._written


def _pick(step: _Step, kept: list[int]) -> _Step:
    """Copy some rows of a step."""
    rows, owners = torch.tensor(kept, dtype=torch.int64), [step.owners[row] for row in kept]
    return _Step(step.number, step.states[rows], step.positions[rows], step.slots[rows], owners)
