"""Tensor parallelism of kept blocks: which of them a rank holds.

The experts' output is a sum over blocks, so that any division of them gives partial outputs that one all-reduce adds
up. Rank r of n holds the blocks of a layer whose number is r modulo n, in their order: an expert's blocks follow each
other, so that every rank has all experts, and of each at most one block more than another rank. How many blocks a rank
holds follows from their number in the layer alone, which a checkpoint's config has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class ShardError(ValueError):
    """A rank that does not exist, as one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of several. Raises ShardError where there is no such rank."""

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            expected = f"rank: expected 0 to {self.ranks - 1}, got {self.rank}"
            raise ShardError(f"{expected}; check the parallel configuration")

    @property
    def blocks(self) -> slice:
        """What is held of a layer's blocks or scales [n, …]."""
        return slice(self.rank, None, self.ranks)

    def count(self, blocks: int) -> int:
        """Count those of a layer's first `blocks` blocks that are held."""
        return (blocks + self.ranks - 1 - self.rank) // self.ranks

    def narrow(self, block_start: torch.Tensor) -> torch.Tensor:
        """Make the held blocks' block_start [E + 1] of the layer's."""
        return (block_start + (self.ranks - 1 - self.rank)) // self.ranks

    def bound(self, blocks_per_expert: int) -> int:
        """Bound the blocks of an expert that any rank holds."""
        return -(-blocks_per_expert // self.ranks)

    def first(self, start: int) -> int:
        """Find the first held one of the blocks that begin at `start`, counted from there."""
        return (self.rank - start) % self.ranks


WHOLE = Shard()
