"""Blocks of a drafter at places of recorded answers, many of a row at once, as it would draft them in service.

A block stands behind an *anchor*, a token that the target has committed: an emitted one, as the first of them comes of
the prompt itself. It sees the target's states of all tokens before the anchor, and itself, never another block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter
from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.drafter.objective import Drafted
from laguna_serve.scripts.training.pruning.streaming.layers import Head


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What the drafter uses of its target, fp32: the embedding [V, H], and norm and matrix of the logits."""

    embedding: torch.Tensor
    head: Head

    @property
    def device(self) -> torch.device:
        """Where drafter and target are computed."""
        return self.embedding.device


class RowStates(Protocol):
    """States of rows: on disk (data/states.py), or of a policy that moves (rl/refresh/policy_states.py)."""

    last: int

    def read(self, layer: int, row: int, length: int) -> torch.Tensor:
        """Read the states [length, H] of a row's first tokens after a layer."""

    def read_context(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """Read the tapped states [B, length, taps, H] fp32 of rows, zeros behind the end of one."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Rows with their states, and what a drafter shares with their target."""

    rows: Sequence[Row]
    states: RowStates
    shared: Shared

    def open(self, chosen: Sequence[int]) -> Batch:
        """Read the states of some rows."""
        rows = [self.rows[row] for row in chosen]
        lengths = torch.tensor([len(row.tokens) for row in rows])
        return Batch(
            tokens=torch.nn.utils.rnn.pad_sequence([row.tokens.long() for row in rows], batch_first=True),
            lengths=lengths,
            temperatures=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
            context=self.states.read_context(chosen, int(lengths.max())).to(self.shared.device),
            last=[self.states.read(self.states.last, number, len(self.rows[number].tokens)) for number in chosen],
            shared=self.shared,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows: tokens [B, L], zeros behind the end of one, context [B, L, taps, H] fp32, and last states [T, H]."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    temperatures: torch.Tensor
    context: torch.Tensor
    last: list[torch.Tensor]
    shared: Shared

    def draft(self, drafter: LagunaDrafter, anchors: torch.Tensor, *, target: bool) -> Drafted:
        """Draft behind `anchors` [B, A] (positions), with the target's logits if asked.

        A sequential head is told what the target said at the places before: what a draft has seen whose earlier places
        were all accepted, and of no others is it asked whether it is.
        """
        device, head = self.shared.device, self.shared.head
        index = anchors[..., None] + torch.arange(drafter.shape.gamma + 1)
        inside = index.clamp_max(self.tokens.shape[1] - 1)
        tokens = self.tokens[:, None].expand(-1, anchors.shape[1], -1).gather(2, inside)
        block = torch.full_like(tokens, drafter.shape.mask_token_id)
        block[..., 0] = tokens[..., 0]
        longest = int(anchors.max())
        hidden = drafter(
            F.embedding(block.flatten(1).to(device), self.shared.embedding),
            index.flatten(1).to(device),
            self.context[:, :longest],
            torch.arange(longest, device=device).expand(len(tokens), -1),
            make_mask(drafter.shape, anchors, longest).to(device),
        )
        followed, previous = tokens[..., 1:].to(device), tokens[..., :-1].to(device)
        hidden = hidden.view(*index.shape, -1)[:, :, 1:]
        return Drafted(
            logits=drafter.condition(drafter.logits(hidden, head.weight), hidden, previous),
            labels=drafter.labels(followed),
            tokens=followed,
            known=(index[..., 1:] < self.lengths[:, None, None]).to(device),
            temperatures=self.temperatures.to(device),
            target=self._find_target(index[..., :-1]) if target else None,
            vocabulary=drafter.get_buffer("vocabulary") if isinstance(drafter, SpeculatorsDrafter) else None,
        )

    @torch.no_grad()
    def _find_target(self, index: torch.Tensor) -> torch.Tensor:
        """Logits [B, A, γ, V] of the target for what follows the positions `index`; of the last one behind an end."""
        found = []
        for states, places in zip(self.last, index, strict=True):
            picked = states[places.clamp_max(len(states) - 1).flatten()].float().to(self.shared.device)
            found.append(self.shared.head(picked).view(*places.shape, -1))
        return torch.stack(found)


def make_mask(shape: DrafterShape, anchors: torch.Tensor, length: int) -> torch.Tensor:
    """[B, A·(γ + 1), length + A·(γ + 1)] bool: which of the context and of all blocks a block's row may look at."""
    size = shape.gamma + 1
    owner = torch.arange(anchors.shape[1]).repeat_interleave(size)
    place = torch.arange(size).repeat(anchors.shape[1])
    first = anchors.repeat_interleave(size, dim=1)
    context = torch.arange(length) < first[..., None]
    own = owner[:, None] == owner
    if shape.causal:
        own = own & (place[:, None] >= place)
    if shape.sliding_window is not None:
        context = context & ((first + place)[..., None] - torch.arange(length) < shape.sliding_window)
        own = own & (place[:, None] - place < shape.sliding_window)
    return torch.cat([context, own.expand(len(anchors), -1, -1)], dim=-1)
