"""Triton kernels of the prefill path, above ROWS tokens: grouped GEMMs that end at each expert's own width.

The (token, expert) pairs are sorted by expert and cut into tiles of BLOCK_M pairs that share one.  `gate_up` forms the
activations of a tile of pairs and a tile of the expert's atoms; `down` multiplies them by the expert's kept down rows,
whose number bounds its loop.  Programs behind the last tile or beyond an expert's width return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tile(
    tile_expert_ptr, tile_first_ptr, pair_end_ptr, block_start_ptr, i_tile, B: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Its expert's first block and width in atoms, the sorted places [BLOCK_M] of its pairs, and which there are."""
    expert = tl.load(tile_expert_ptr + i_tile)
    start = tl.load(block_start_ptr + expert).to(tl.int64)
    width = (tl.load(block_start_ptr + expert + 1).to(tl.int64) - start) * B
    place = tl.load(tile_first_ptr + i_tile).to(tl.int64) + tl.arange(0, BLOCK_M)
    return start, width, place, place < tl.load(pair_end_ptr + expert)


@triton.jit
def gate_up(
    x_ptr,
    weights_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    pair_end_ptr,
    num_tiles_ptr,
    w13_ptr,
    block_start_ptr,
    act_ptr,
    k,
    act_stride,
    H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act [pairs, act_stride] ← weight · silu(x · gateᵀ) ∘ (x · upᵀ), pairs sorted by expert."""
    i_atoms = tl.program_id(0)
    i_tile = tl.program_id(1)
    if i_tile >= tl.load(num_tiles_ptr):
        return
    start, width, place, there = _load_tile(
        tile_expert_ptr, tile_first_ptr, pair_end_ptr, block_start_ptr, i_tile, B, BLOCK_M
    )
    if i_atoms * BLOCK_A >= width:
        return
    pair = tl.load(order_ptr + place, mask=there, other=0)  # [BLOCK_M]
    weight = tl.load(weights_ptr + pair, mask=there, other=0.0)
    atom = i_atoms * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = atom < width
    i_h = tl.arange(0, BLOCK_H)
    p_x = x_ptr + (pair // k).to(tl.int64)[:, None] * H
    p_gate = w13_ptr + ((start + atom // B) * (2 * B) + atom % B)[None, :] * H
    gate = tl.zeros((BLOCK_M, BLOCK_A), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_A), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        column = h + i_h
        b_x = tl.load(p_x + column[None, :], mask=there[:, None] & (column < H)[None, :], other=0.0)
        b_mask = inside[None, :] & (column < H)[:, None]
        b_gate = tl.load(p_gate + column[:, None], mask=b_mask, other=0.0)  # [BLOCK_H, BLOCK_A]
        b_up = tl.load(p_gate + (B * H + column)[:, None], mask=b_mask, other=0.0)
        gate = tl.dot(b_x, b_gate, gate, input_precision=PRECISION)
        up = tl.dot(b_x, b_up, up, input_precision=PRECISION)
    act = weight[:, None] * (gate / (1.0 + tl.exp(-gate))) * up
    p_act = act_ptr + place[:, None] * act_stride + atom[None, :]
    tl.store(p_act, act.to(act_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def down(
    act_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    pair_end_ptr,
    num_tiles_ptr,
    w2_ptr,
    block_start_ptr,
    pair_out_ptr,
    act_stride,
    H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """pair_out [pairs, H] ← act · w2 of the pair's expert, pairs in the order of topk_ids."""
    i_n = tl.program_id(0)
    i_tile = tl.program_id(1)
    if i_tile >= tl.load(num_tiles_ptr):
        return
    start, width, place, there = _load_tile(
        tile_expert_ptr, tile_first_ptr, pair_end_ptr, block_start_ptr, i_tile, B, BLOCK_M
    )
    column = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i_k = tl.arange(0, BLOCK_K)
    p_act = act_ptr + place[:, None] * act_stride
    p_w2 = w2_ptr + start * B * H + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        atom = first + i_k
        inside = atom < width
        b_act = tl.load(p_act + atom[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        b_w2 = tl.load(p_w2 + atom[:, None] * H, mask=inside[:, None] & (column < H)[None, :], other=0.0)
        sums = tl.dot(b_act, b_w2, sums, input_precision=PRECISION)
    pair = tl.load(order_ptr + place, mask=there, other=0).to(tl.int64)
    p_out = pair_out_ptr + pair[:, None] * H + column[None, :]
    tl.store(p_out, sums.to(pair_out_ptr.dtype.element_ty), mask=there[:, None] & (column < H)[None, :])
