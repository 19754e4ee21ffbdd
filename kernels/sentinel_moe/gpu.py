"""Scratch memory, grids and the choice of path for the Triton kernels.

Everything launched depends on shapes alone, so that a CUDA graph can hold a call, and all scratch comes from torch's
allocator on the current stream, so that calls on several streams do not share it.
"""

from __future__ import annotations

import functools

import torch
import triton

from laguna_serve.kernels.sentinel_moe import decode, prefill
from laguna_serve.kernels.sentinel_moe.configs import decode_config, prefill_config

DECODE_ROWS = int(decode.ROWS.value)
# Activations and pair outputs of one pass of the prefill path: 6,500 tokens at 8 experts of 512 and hidden size 2048.
PREFILL_SCRATCH_BYTES = 256 * 2**20


def run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    max_blocks: int,
) -> torch.Tensor:
    """Run the op for checked tensors (shapes as in launch.py).

    These are decode kernels up to 16 tokens, prefill kernels above.
    """
    out = torch.empty_like(x)
    T, k = topk_ids.shape
    if T == 0:
        return out
    if T <= DECODE_ROWS:
        run_decode(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, max_blocks, out)
        return out
    per_token = k * (max_blocks * w2_blocks.shape[1] + x.shape[1]) * x.element_size()
    tokens = max(DECODE_ROWS, PREFILL_SCRATCH_BYTES // per_token)
    for first in range(0, T, tokens):
        rows = slice(first, first + tokens)
        run_prefill(
            x[rows], topk_weights[rows], topk_ids[rows], w13_blocks, w2_blocks, block_start, max_blocks, out[rows]
        )
    return out


def run_decode(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    max_blocks: int,
    out: torch.Tensor,
) -> None:
    """Two launches for 1 to 16 tokens."""
    T, k = topk_ids.shape
    E = block_start.numel() - 1
    n, B, H = w2_blocks.shape
    config = decode_config(B, x.element_size())
    split, column_tiles = B // config.slice_, triton.cdiv(H, config.block_n)
    act = x.new_empty(n, DECODE_ROWS, B)
    plan = torch.empty(1 + T * k * max_blocks, dtype=torch.int32, device=x.device)
    arrivals = torch.empty(column_tiles, dtype=torch.int32, device=x.device)
    partial = torch.empty((split, DECODE_ROWS, H) if split > 1 else 1, dtype=torch.float32, device=x.device)
    dependent_launch = _has_dependent_launch(x.device)
    decode.gate_up[(T * k, triton.cdiv(max_blocks * B, config.block_a) + 1)](
        x,
        topk_weights,
        topk_ids,
        w13_blocks,
        block_start,
        act,
        plan,
        arrivals,
        T,
        k,
        E,
        column_tiles,
        H=H,
        B=B,
        E_PAD=triton.next_power_of_2(E),
        K_PAD=triton.next_power_of_2(k),
        MAX_BLOCKS_PAD=triton.next_power_of_2(max_blocks),
        ARRIVALS_PAD=triton.next_power_of_2(column_tiles),
        BLOCK_A=config.block_a,
        BLOCK_H=config.block_h,
        PRECISION="ieee",
        PDL=dependent_launch,
        num_warps=config.warps[0],
        num_stages=config.stages[0],
    )
    decode.down[(column_tiles, split)](
        act,
        w2_blocks,
        plan,
        partial,
        arrivals,
        out,
        T,
        H=H,
        B=B,
        SPLIT=split,
        BLOCK_N=config.block_n,
        PRECISION="ieee",
        PDL=dependent_launch,
        num_warps=config.warps[1],
        num_stages=config.stages[1],
        **({"launch_pdl": True} if dependent_launch else {}),
    )


def run_prefill(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    max_blocks: int,
    out: torch.Tensor,
) -> None:
    """Run grouped GEMMs for any number of tokens whose scratch fits."""
    k = topk_ids.shape[1]
    _, B, H = w2_blocks.shape
    config = prefill_config(x.element_size())
    tiles = sort_pairs(topk_ids, block_start.numel() - 1, config.block_m)
    num_tiles = tiles[1].numel()
    act = x.new_empty(topk_ids.numel(), max_blocks * B)
    pair_out = x.new_empty(topk_ids.numel(), H)
    prefill.gate_up[(triton.cdiv(max_blocks * B, config.block_a), num_tiles)](
        x,
        topk_weights,
        *tiles,
        w13_blocks,
        block_start,
        act,
        k,
        act.stride(0),
        H=H,
        B=B,
        BLOCK_M=config.block_m,
        BLOCK_A=config.block_a,
        BLOCK_H=config.block_h,
        PRECISION="ieee",
        num_warps=config.warps[0],
        num_stages=config.stages[0],
    )
    prefill.down[(triton.cdiv(H, config.block_n), num_tiles)](
        act,
        *tiles,
        w2_blocks,
        block_start,
        pair_out,
        act.stride(0),
        H=H,
        B=B,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION="ieee",
        num_warps=config.warps[1],
        num_stages=config.stages[1],
    )
    out.copy_(pair_out.view(-1, k, H).sum(dim=1, dtype=torch.float32))


def sort_pairs(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, ...]:
    """Sort pairs into the tiles of the prefill path, on the device and without a look at its values.

    Returns order [P] (pair at each sorted place), tile_expert and tile_first [M] (expert and first place of every
    tile), pair_end [E] (place behind an expert's last pair) and num_tiles [1]; M is the most tiles that P pairs can
    need, those from num_tiles on are to be passed over.
    """
    pairs = topk_ids.numel()
    ids, order = topk_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    bounds = torch.searchsorted(ids, experts)  # [E + 1]
    tile_end = ((bounds.diff() + (block_m - 1)) // block_m).cumsum(0)  # [E]
    most = pairs // block_m + min(num_experts, pairs)
    tile = torch.arange(most, device=ids.device)
    tile_expert = torch.searchsorted(tile_end, tile, right=True).clamp_(max=num_experts - 1)
    before = torch.where(tile_expert > 0, tile_end[tile_expert - 1], 0)
    tile_first = bounds[tile_expert] + (tile - before) * block_m
    return order, tile_expert, tile_first, bounds[1:].contiguous(), tile_end[-1:]


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    """Programmatic dependent launch: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
