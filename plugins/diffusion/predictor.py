"""The target's side of a decode: logits for any number of states of any number of requests in one pass.

With a cache, a block is opened by a pass over the whole sequence: it gives the block's first logits and the keys and
values of what is around the block, which the block's later states share. That is an approximation, as the published
ones are, and therefore part of the reference: the state in which a block is opened always gets its logits from the
opening pass, every other one from the block's cache. Which of the two follows from the state alone.

Source: arXiv:2505.22618 (Fast-dLLM) for the two caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import Cache
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.passes import Context, MaskModel, RowOutput, RowSet, run_pass


@dataclass(slots=True)
class Slot:
    """What a predictor keeps for a request between passes: keys and values around one block.

    Attributes:
        opened: the state in which that block was opened; of another block nothing is kept.
        contexts: for the prompt in sight and, with guidance, for the prompt masked.
    """

    opened: State | None = None
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """States of one request whose logits are wanted, all of the same block where there is a cache."""

    canvas: Canvas
    slot: Slot
    states: Sequence[State]


@dataclass(slots=True)
class Predictor:
    """A model with a cache mode and a guidance.

    Attributes:
        passes: how many there were.
        rows: positions that were computed in them.
    """

    model: Llada | MaskModel
    cache: Cache = "none"
    guidance: float = 0.0
    passes: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)

    def opens(self, canvas: Canvas, state: State) -> bool:
        """Say whether the state's pass opens its block, so that no other state of the request can share it yet."""
        return self.cache != "none" and state == canvas.begin_block(state)

    def predict(self, asks: Sequence[Ask]) -> list[dict[State, torch.Tensor]]:
        """Compute for every ask its states' logits [block_length, vocabulary] fp32 of their open blocks, in one pass.

        A state within a block whose cache is not there (the run was resumed, or the state proposed too early) costs a
        pass more, which opens the block.
        """
        self._run([ask for ask in asks if self._lacks_cache(ask)], opening=True)
        return self._run(asks, opening=False)

    def _lacks_cache(self, ask: Ask) -> bool:
        if self.cache == "none" or all(self.opens(ask.canvas, state) for state in ask.states):
            return False
        return ask.slot.opened != ask.canvas.begin_block(ask.states[0])

    def count_rows(self, canvas: Canvas, state: State) -> int:
        """Count the positions that the state's pass computes, with guidance twice."""
        block = canvas.find_block(state)
        assert block is not None, "a finished state has no successor"
        behind = canvas.length - block.start if self.cache == "prefix" else len(block)
        whole = self.cache == "none" or self.opens(canvas, state)
        return len(self._sides) * (len(canvas.prompt) + canvas.length if whole else behind)

    def _run(self, asks: Sequence[Ask], *, opening: bool) -> list[dict[State, torch.Tensor]]:
        """Run one pass over all states of the asks, or over those in which their blocks were opened."""
        states = [[ask.canvas.begin_block(ask.states[0])] if opening else ask.states for ask in asks]
        wanted = [(number, ask, state) for number, ask in enumerate(asks) for state in states[number]]
        if not wanted:
            return []
        row_sets = [self._describe(ask, state, masked) for _, ask, state in wanted for masked in self._sides]
        model = self.model
        outputs = iter(model.run_pass(row_sets) if isinstance(model, MaskModel) else run_pass(model, row_sets))
        self.passes += 1
        self.rows += sum(len(rows.ids) for rows in row_sets)
        answers: list[dict[State, torch.Tensor]] = [{} for _ in asks]
        for number, ask, state in wanted:
            sides = [next(outputs) for _ in self._sides]
            if self.opens(ask.canvas, state):
                self._keep(ask, state, sides)
            answers[number][state] = self._guide([side.logits for side in sides])
        return answers

    @property
    def _sides(self) -> tuple[bool, ...]:
        """Whether the prompt is masked, for each row set of a state."""
        return (False, True) if self.guidance else (False,)

    def _describe(self, ask: Ask, state: State, masked: bool) -> RowSet:
        """Describe the row set of a state."""
        canvas = ask.canvas
        prompt = (canvas.mask_id,) * len(canvas.prompt) if masked else canvas.prompt
        ids, block = prompt + state, canvas.find_block(state)
        assert block is not None, "a finished state has no successor"
        first, behind = len(prompt) + block.start, len(prompt) + block.stop
        if self.cache == "none" or self.opens(canvas, state):
            return RowSet(ids, 0, slice(first, behind), keep=self.cache != "none")
        assert ask.slot.opened == canvas.begin_block(state), "one block at a time"
        end = behind if self.cache == "dual" else len(ids)
        return RowSet(ids[first:end], first, slice(0, len(block)), ask.slot.contexts[masked])

    def _keep(self, ask: Ask, state: State, sides: list[RowOutput]) -> None:
        """Keep what is around the block that a pass has opened."""
        block = ask.canvas.find_block(state)
        assert block is not None
        first, behind = len(ask.canvas.prompt) + block.start, len(ask.canvas.prompt) + block.stop
        places = list(range(first))
        if self.cache == "dual":
            places += range(behind, len(ask.canvas.prompt) + ask.canvas.length)
        ask.slot.opened = state
        ask.slot.contexts = tuple(tuple((k[places], v[places]) for k, v in side.kept) for side in sides)

    def _guide(self, sides: list[torch.Tensor]) -> torch.Tensor:
        """Move the logits away from those without the prompt."""
        if len(sides) == 1:
            return sides[0]
        seen, unseen = sides
        return unseen + (self.guidance + 1) * (seen - unseen)
