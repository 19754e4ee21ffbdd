"""A drafter's context, kept up without the drafter: what the target computed waits, and is written in one pass.

A DFlash drafter attends to keys and values of its own, made of the target's hidden states. In a step without drafts
they are not needed yet, and making them costs as much as a small model's prompts do by some percent. So the hidden
states wait here with their positions and slots. Those that nobody can read any more when a request ends are dropped;
the others are written together, before the next pass of the drafter, before their blocks may be read through the prefix
cache or change hands, and when many wait.

Checked against vLLM 0.32.0 (`DFlashProposer.build_model_inputs_first_pass`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.plugins.drafting.context import store_taps
from laguna_serve.plugins.repairs.row_counts import pad

# What may wait, in rows and in bytes of hidden states, of which at least so many rows. What was dropped and is not
# cleared away yet comes on top, at most so many times as much; places are a power of two.
MOST_ROWS, MOST_BYTES, LEAST_ROWS = 16384, 128 << 20, 512
MOST_DROPPED = 2
# Steps whose rows are put into their places together.
MOST_STEPS = 64
# Room for so many rows is kept when all are written.
KEPT_ROWS = 2048
# Written rows after which what they took weighs a third.
MEMORY_ROWS = 1024.0

Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Step:
    """Rows of a step: the taps' hidden states, each [rows, hidden], positions, slots, and whose each is."""

    taps: list[torch.Tensor]
    positions: torch.Tensor
    slots: torch.Tensor
    owners: Sequence[str]


class WaitingContext:
    """Rows of hidden states on their way into the drafter's part of the KV cache; `row_s`: what writing one takes."""

    # Of each row, in the order in which they came; the first `_end` places are taken, `_lost` of them by dropped or
    # written ones, which are not alive.
    _states: torch.Tensor
    _positions: torch.Tensor
    _slots: torch.Tensor
    _owners: npt.NDArray[np.int64]
    _alive: Mask

    def __init__(self) -> None:
        self.row_s = 0.0
        self._written = self._write_s = 0.0
        self._end = self._lost = 0
        self._allocate(0, torch.empty(0, 0))
        # What came since rows were gathered last, and how many rows that is.
        self._steps: list[_Step] = []
        self._fresh = 0
        # Request → its number among the owners; one that begins anew after it was dropped has another.
        self._numbers: dict[str, int] = {}
        self._next = 0

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return self._end - self._lost + self._fresh

    @property
    def is_full(self) -> bool:
        """Whether they should be written, as too many wait."""
        if not self._steps and not self._end:
            return False
        taps = self._steps[0].taps if self._steps else [self._states]
        most = max(LEAST_ROWS, MOST_BYTES // sum(tap.shape[1] * tap.element_size() for tap in taps))
        return self.rows >= min(MOST_ROWS, most)

    def add(
        self,
        taps: Sequence[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        owners: Sequence[str],
        kept: torch.Tensor | None,
    ) -> None:
        """Queue a step's rows for the next write.

        taps: each [≥ rows, hidden], new in every step; positions and slots [rows], buffers of the runner that the next
        step overwrites; owners: the request of each row; kept: the rows that hold committed tokens, None for all.
        """
        if kept is None:
            rows = positions.shape[0]
            step = _Step([tap[:rows] for tap in taps], positions.clone(), slots.clone(), owners)
        else:
            chosen = [owners[row] for row in kept.tolist()]
            step = _Step([tap[kept] for tap in taps], positions[kept], slots[kept], chosen)
        self._steps.append(step)
        self._fresh += len(step.owners)
        if len(self._steps) >= MOST_STEPS:
            self._gather()

    def _gather(self) -> None:
        """Put what came since the last time into its places."""
        steps, rows = self._steps, self._fresh
        if not rows:
            self._steps = []
            return
        widths = [tap.shape[1] for tap in steps[0].taps]
        if self._end + rows > len(self._alive):
            places = max(LEAST_ROWS, 1 << (self._end + rows - 1).bit_length())
            self._allocate(places, steps[0].taps[0].new_empty(0, sum(widths)))
        place = slice(self._end, self._end + rows)
        for tap, into in enumerate(self._states[place].split(widths, dim=1)):
            into.copy_(torch.cat([step.taps[tap] for step in steps]))
        self._positions[place] = torch.cat([step.positions for step in steps])
        self._slots[place] = torch.cat([step.slots for step in steps])
        self._owners[place] = [self._number(owner) for step in steps for owner in step.owners]
        self._alive[place] = True
        self._end += rows
        self._steps, self._fresh = [], 0

    def _number(self, owner: str) -> int:
        number = self._numbers.get(owner)
        if number is None:
            number = self._numbers[owner] = self._next
            self._next += 1
        return number

    def _allocate(self, places: int, like: torch.Tensor) -> None:
        """Grow the buffers to `places` rows, keeping those in use; hidden states are `like` these."""
        end = self._end
        states, positions, slots = like.new_empty(places, like.shape[1]), *torch.empty(2, places, dtype=torch.int64)
        owners, alive = np.empty(places, np.int64), np.empty(places, np.bool_)
        if end:
            states[:end], positions[:end], slots[:end] = self._states[:end], self._positions[:end], self._slots[:end]
            owners[:end], alive[:end] = self._owners[:end], self._alive[:end]
        self._states, self._positions, self._slots = states, positions, slots
        self._owners, self._alive = owners, alive

    def end(self, model: Any, requests: Mapping[str, int]) -> None:
        """Settle the rows of requests that have ended, or begin anew, each with the position from which nobody reads.

        Those from there on are dropped, the others written. Dropped rows are cleared away once they are twice as many
        as those that wait, which are copied for it.
        """
        self._gather()
        written = np.zeros(self._end, np.bool_)
        for request, first in requests.items():
            if (number := self._numbers.pop(request, None)) is not None:
                theirs = self._alive[: self._end] & (self._owners[: self._end] == number)
                unread = theirs & (self._positions[: self._end].numpy() >= first)
                self._lose(unread)
                written |= theirs & ~unread
        if written.any():
            self._write(model, written)
        if self._lost > max(LEAST_ROWS, MOST_DROPPED * self.rows):
            self._clear_away()

    def _lose(self, rows: Mask) -> None:
        """Take rows out of those that wait."""
        self._alive[: self._end] &= ~rows
        self._lost += int(rows.sum())

    def _clear_away(self) -> None:
        """Move the rows that wait together."""
        kept = np.flatnonzero(self._alive[: self._end])
        rows, index = len(kept), torch.from_numpy(kept)
        for each in (self._states, self._positions, self._slots):
            each[:rows] = each[index]
        self._owners[:rows] = self._owners[kept]
        self._alive[:rows] = True
        self._end, self._lost = rows, 0

    def write(self, model: Any) -> None:
        """Make keys and values of all rows with the drafter's model, and store them."""
        self._gather()
        if self.rows:
            self._write(model, self._alive[: self._end].copy())
        self._end = self._lost = 0
        self._numbers.clear()
        if len(self._alive) > KEPT_ROWS:
            self._allocate(0, self._states)

    def _write(self, model: Any, chosen: Mask) -> None:
        """Make keys and values of some rows, and store them; they wait no more."""
        begin = perf_counter()
        found = np.flatnonzero(chosen)
        rows = len(found)
        found = np.pad(found, (0, pad(rows) - rows), mode="edge")  # the last row, to a number that comes again
        index = torch.from_numpy(found)
        store_taps(model, self._states[index], self._positions[index], self._slots[index])
        self._lose(chosen)
        keep = math.exp(-rows / MEMORY_ROWS)
        self._written, self._write_s = self._written * keep + rows, self._write_s * keep + perf_counter() - begin
        self.row_s = self._write_s / self._written
