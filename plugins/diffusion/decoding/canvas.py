"""Canvases and their states.

A state is the answer as it stands: the ids of its positions, masked ones with the mask's id. Which block is open
follows from it, and so does everything that a step may depend on; two ways to the same state are the same state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from laguna_serve.plugins.diffusion.errors import DiffusionError

State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Canvas:
    """A prompt and the room for its answer, filled block by block from the left.

    Attributes:
        length: positions of the answer, a multiple of block_length. It is in the model's sight from the first step:
            another length gives another text.
    """

    prompt: tuple[int, ...]
    length: int
    block_length: int
    mask_id: int

    def __post_init__(self) -> None:
        if self.block_length < 1 or self.length < 1 or self.length % self.block_length:
            got = f"{self.length} in blocks of {self.block_length}"
            raise DiffusionError(f"canvas: expected a positive number of whole blocks, got {got}; round it up")
        if not self.prompt:
            raise DiffusionError("prompt: expected at least one token, got none; begin with the one that starts a text")
        if self.mask_id in self.prompt:
            where = self.prompt.index(self.mask_id)
            raise DiffusionError(f"prompt: expected no mask ({self.mask_id}), got one at {where}; take it out")

    def start(self) -> State:
        """Return the state with nothing committed."""
        return (self.mask_id,) * self.length

    def find_block(self, state: State) -> range | None:
        """Find the positions of the open block, the first with a mask; None where nothing is masked."""
        if self.mask_id not in state:
            return None
        first = state.index(self.mask_id) // self.block_length * self.block_length
        return range(first, first + self.block_length)

    def list_open(self, state: State) -> list[int]:
        """List the masked positions of the open block, from the left."""
        block = self.find_block(state)
        return [] if block is None else [at for at in block if state[at] == self.mask_id]

    def begin_block(self, state: State) -> State:
        """Return the state in which the open block was opened: all of it masked, and all behind it."""
        block = self.find_block(state)
        return state if block is None else state[: block.start] + (self.mask_id,) * (self.length - block.start)

    def commit(self, state: State, tokens: Mapping[int, int]) -> State:
        """Return the state with ids put on masked positions: position → id."""
        filled = list(state)
        for at, token in tokens.items():
            assert filled[at] == self.mask_id, "committed tokens never change"
            filled[at] = token
        return tuple(filled)

    def read_prefix(self, state: State) -> State:
        """Return what is committed without a gap from the left; it never changes again, so it can be sent."""
        return state[: state.index(self.mask_id)] if self.mask_id in state else state

    def find_end(self, state: State, stop: Collection[int]) -> int | None:
        """Find the length of the finished answer, its first stop token included; None while it is not finished.

        It is as soon as all before that token is committed: what comes later changes nothing before it.
        """
        prefix = self.read_prefix(state)
        ended = next((at + 1 for at, token in enumerate(prefix) if token in stop), None)
        return ended if ended is not None or len(prefix) < len(state) else len(state)
