"""Tensor parallelism of kept blocks: which of them a rank holds.

The experts' output is a sum over blocks, so that any division of each expert's blocks gives partial outputs that one
all-reduce adds up.  Rank r of n holds the blocks of every expert whose number within the expert is r modulo n, in
their order: every rank has all experts, and at most one block an expert more than another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class ShardError(ValueError):
    """A rank that does not exist, or a block_start that does not ascend, as one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a layer: `blocks` [m] int64, its block numbers in the layer; `block_start` [E + 1] int32."""

    blocks: torch.Tensor
    block_start: torch.Tensor

    @property
    def most(self) -> int:
        """Blocks of the widest expert here: the bound that the op is given."""
        return int(self.block_start.diff().max())


def take_shard(block_start: torch.Tensor, rank: int, ranks: int) -> Shard:
    """Take what `rank` holds of a layer whose experts keep block_start [E + 1]; blocks and scales go by `Shard.blocks`.

    Raises:
        ShardError: rank is not below ranks, or block_start does not ascend from 0.
    """
    if not 0 <= rank < ranks:
        raise ShardError(f"rank: expected 0 to {ranks - 1}, got {rank}; check the parallel configuration")
    start = block_start.to("cpu", torch.int64)
    widths = start.diff()
    if start[0] != 0 or (len(widths) and widths.min() < 0):
        raise ShardError(f"block_start: expected ascending numbers from 0, got {start.tolist()[:8]}; make it again")
    number = torch.arange(int(start[-1])) - start[:-1].repeat_interleave(widths)  # within the expert
    held = (widths + (ranks - 1 - rank)) // ranks
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), held.cumsum(0)])
    return Shard((number % ranks == rank).nonzero().flatten(), ends.to(torch.int32))
