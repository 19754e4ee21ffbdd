"""What stage 2 learns from: batches of tokens, and the teacher's distribution at those that are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.losses import Top, read_top
from laguna_serve.scripts.training.dense.tokens import Tokens

HELD_OUT_BATCHES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of tokens.

    Attributes:
        ids: [R, L] int64.
        spoken: [R, L] bool: those to be learned.
        tops: the teacher's distribution in each row, where it is known before the student is run.
    """

    ids: torch.Tensor
    spoken: torch.Tensor
    tops: tuple[Top, ...] | None = None

    @property
    def predicted(self) -> torch.Tensor:
        """Which places [R, L − 1] predict a token that is to be learned."""
        return self.spoken[:, 1:]


class Source(Protocol):
    """Conversations or text, of which batches are drawn by name."""

    @property
    def tokens(self) -> Tokens:
        """What they are drawn from."""

    def spoken_batch(self, seed: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [rows, length] and which of them are to be learned."""


class Targets(Protocol):
    """Where the teacher's distributions come from."""

    def batch(self, step: int) -> Batch:
        """Return the batch of a step of stage 2."""

    def held_out(self, number: int) -> Batch:
        """Return one of HELD_OUT_BATCHES batches that nothing is trained on."""

    def top(self, batch: Batch, rows: slice) -> Top:
        """Return the teacher's distribution at the predicted places of some rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The batches of a recipe, by name, from what is trained on and from what is held out."""

    training: Source
    held_out_source: Source
    recipe: Recipe

    def batch(self, step: int) -> Batch:
        """Return the batch of a step of stage 2."""
        name = self.recipe.batch_of(2, step)
        return Batch(*self.training.spoken_batch(name, self.recipe.rows, self.recipe.length))

    def held_out(self, number: int) -> Batch:
        """Return one of HELD_OUT_BATCHES batches that nothing is trained on."""
        name = f"held-out/{number}"
        return Batch(*self.held_out_source.spoken_batch(name, self.recipe.rows, self.recipe.length))


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A teacher in memory, which runs beside the student."""

    teacher: LagunaForCausalLM
    drawn: Drawn

    def batch(self, step: int) -> Batch:
        """Return the batch of a step of stage 2."""
        return self.drawn.batch(step)

    def held_out(self, number: int) -> Batch:
        """Return one of HELD_OUT_BATCHES batches that nothing is trained on."""
        return self.drawn.held_out(number)

    def top(self, batch: Batch, rows: slice) -> Top:
        """Run the teacher on some rows: its whole distribution at their predicted places."""
        device = self.teacher.device
        ids, predicted = batch.ids[rows].to(device), batch.predicted[rows].to(device)
        return read_top(self.teacher, ids, predicted, self.teacher.config.vocab_size)


def join_tops(tops: tuple[Top, ...]) -> Top:
    """Put the distributions of rows one after the other."""
    ids = None if tops[0].ids is None else torch.cat([top.ids for top in tops if top.ids is not None])
    return Top(ids, torch.cat([top.logprobs for top in tops]), torch.cat([top.tail for top in tops]))
