"""What a proposer is given and what it gives. Nothing that it says can change a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood, read_likelihoods
from laguna_serve.plugins.diffusion.decoding.reference import Reference, step
from laguna_serve.plugins.diffusion.predictor import Slot


@dataclass(slots=True, eq=False, weakref_slot=True)
class Run:
    """A request being decoded.

    Attributes:
        reference: the one that decides its text; runs that share a pass may have unlike ones.
        state: not evaluated yet.
        stop: ids that end the answer.
        limit: tokens after which the answer ends in any case; None: the canvas.
        listed: so many of the likeliest ids are kept beside each committed token's likelihood; None: not even that.
        likelihoods: by position, of what is committed.
        last: the state before it and its logits [block_length, vocabulary] fp32; None at the start, or not kept.
        steps: of the reference, so far.
        passes: of the target.
        proposed, accepted: states beside the current one, and those of them that the run then came by.
    """

    canvas: Canvas
    reference: Reference
    state: State
    stop: Collection[int] = ()
    limit: int | None = None
    listed: int | None = None
    likelihoods: dict[int, Likelihood] = field(default_factory=dict)
    slot: Slot = field(default_factory=Slot)
    last: tuple[State, torch.Tensor] | None = None
    steps: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0

    @classmethod
    def begin(
        cls,
        canvas: Canvas,
        reference: Reference = Reference(),  # noqa: B008 - frozen
        stop: Collection[int] = (),
        limit: int | None = None,
        listed: int | None = None,
    ) -> Run:
        """Begin with nothing committed."""
        return cls(canvas, reference, canvas.start(), stop, limit, listed)

    def take_step(self, logits: torch.Tensor, *, keep: bool = True) -> None:
        """Take the reference's step, by logits [block_length, vocabulary] fp32 that were computed for this state.

        keep: them, for proposals: of a large vocabulary they are hundreds of MiB.
        """
        before = self.state
        self.state = step(self.canvas, self.reference, before, logits)
        self.last = (before, logits) if keep else None
        self.steps += 1
        if self.listed is not None:
            self.likelihoods |= read_likelihoods(self.canvas, before, self.state, logits, self.listed)

    def find_end(self) -> int | None:
        """Find the length of the finished answer; None while it is not finished."""
        end = self.canvas.find_end(self.state, self.stop)
        if self.limit is None:
            return end
        if end is None and len(self.canvas.read_prefix(self.state)) < self.limit:
            return None
        return self.limit if end is None else min(end, self.limit)

    def read_answer(self) -> State:
        """Return what of the answer is there without a gap; it never changes again, so it can be sent."""
        return self.canvas.read_prefix(self.state)[: self.find_end()]

    def find_stale(self) -> torch.Tensor | None:
        """Find the last logits, if they are of the block that is open now."""
        if self.last is None or self.canvas.find_block(self.last[0]) != self.canvas.find_block(self.state):
            return None
        return self.last[1]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A state, and the estimated chance that the reference comes by it from the current one."""

    state: State
    chance: float


class Proposer(Protocol):
    """Proposes states, given several runs at once so that a draft takes one pass for all."""

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose up to `most` states for each run, the likeliest first, its current state not among them."""
