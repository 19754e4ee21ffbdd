"""Kept blocks over several ranks: each block once, evenly, and partial outputs that add up to the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from laguna_serve.kernels.sentinel_moe import sentinel_moe
from laguna_serve.plugins.shards import Shard, ShardError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from moe_cases import SHAPES, TOLERANCE, in_fp64, make_inputs, quantise, relative_error


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("widths", [[8, 7, 1, 3], [0, 3, 0, 2, 5], [1] * 6, [0]])
def test_every_block_is_held_once_and_evenly(widths: list[int], ranks: int) -> None:
    start = torch.tensor([0, *widths]).cumsum(0).to(torch.int32)
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    numbers = torch.arange(sum(widths))
    assert sorted(torch.cat([numbers[shard.blocks] for shard in shards]).tolist()) == numbers.tolist()
    held = torch.stack([shard.narrow(start).diff() for shard in shards])  # [ranks, E]
    assert held.sum(0).tolist() == widths
    assert (held.max(0).values - held.min(0).values).max() <= 1
    for shard in shards:
        mine, narrow = numbers[shard.blocks], shard.narrow(start)
        assert narrow.dtype == torch.int32
        assert len(mine) == narrow[-1] == shard.count(len(numbers))
        assert narrow.diff().max() <= shard.bound(max(widths))
        for expert, width in enumerate(widths):
            own = numbers[start[expert] : start[expert + 1]]
            assert (
                mine[narrow[expert] : narrow[expert + 1]].tolist()
                == own[shard.first(int(start[expert])) :: ranks].tolist()
            )
            assert len(own) == width


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", ["toy", "an expert without blocks", "block 64"])
def test_partial_outputs_add_up(shape: str, ranks: int) -> None:
    """In fp32, in bf16 and over 8-bit weights, within the tolerance of the whole layer."""
    H, B, widths, k = SHAPES[shape]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(7, H, B, widths, k, dtype)
        quantised, scales = quantise(inputs)
        for whole, keywords in ((inputs, {}), (quantised, scales)):
            total = torch.zeros(7, H, dtype=torch.float64)
            for rank in range(ranks):
                shard = Shard(rank, ranks)
                part = whole._replace(
                    w13_blocks=whole.w13_blocks[shard.blocks].contiguous(),
                    w2_blocks=whole.w2_blocks[shard.blocks].contiguous(),
                    block_start=shard.narrow(whole.block_start),
                )
                mine = {name: tensor[shard.blocks].contiguous() for name, tensor in keywords.items()}
                total += sentinel_moe(*part, **mine, max_blocks_per_expert=shard.bound(max(widths))).double()
            assert relative_error(total, in_fp64(whole, **keywords)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_is_not_there_is_named(rank: int, ranks: int) -> None:
    with pytest.raises(ShardError, match=r"^rank: expected 0 to -?\d+, got -?\d+; check the parallel"):
        Shard(rank, ranks)
