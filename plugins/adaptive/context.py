"""A drafter's context, kept up without the drafter: what the target computed waits, and is written in one pass.

A DFlash drafter attends to keys and values of its own, made of the target's hidden states.  In a step without drafts
they are not needed yet, and made one row at a time they would cost a tenth of a small model's step.  So the hidden
states wait here with their positions and slots, and are written together: before the next pass of the drafter, before
their blocks may become another request's or be read through the prefix cache, and when many wait.

Checked against vLLM 0.32.0 (`DFlashProposer.build_model_inputs_first_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Rows that may wait; more cost no less per row.
MOST_ROWS = 512


class WaitingContext:
    """Rows of hidden states on their way into the drafter's part of the KV cache."""

    def __init__(self) -> None:
        self.rows = 0
        self._states: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []

    def add(
        self, taps: Sequence[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor, kept: torch.Tensor | None
    ) -> None:
        """Let a step's rows wait.

        taps: each [≥ rows, hidden]; positions and slots [rows], buffers of the runner that the next step overwrites;
        kept: the rows that hold committed tokens, None for all.
        """
        rows = positions.shape[0]
        states = torch.cat([tap[:rows] for tap in taps], dim=-1)
        if kept is None:
            self._states.append(states)
            self._positions.append(positions.clone())
            self._slots.append(slots.clone())
        else:
            rows = kept.shape[0]
            self._states.append(states[kept])
            self._positions.append(positions[kept])
            self._slots.append(slots[kept])
        self.rows += rows

    def write(self, model: Any) -> None:
        """Make keys and values of all rows with the drafter's model, and store them."""
        if not self.rows:
            return
        states, positions, slots = (torch.cat(parts) for parts in (self._states, self._positions, self._slots))
        self.rows = 0
        self._states, self._positions, self._slots = [], [], []
        model.precompute_and_store_context_kv(model.combine_hidden_states(states), positions, slots)
