"""Triton kernels of the decode path, up to ROWS tokens: two launches, every kept block of a chosen expert read once.

`gate_up` has a program for each (pair, tile of atoms).  The first pair that names an expert works for all tokens that
chose it, the later ones return at once; the tile is always ROWS tokens wide, so that a token's sums are formed by the
same instructions whatever shares the batch with it.  The routing weight is folded in before the one rounding, and rows
that did not choose the expert are stored as zeros.

`down` is then one product, act [ROWS, K] · w2 [K, H] over the atoms of all chosen experts in ascending order.  A
program owns a range of columns and a slice of every block's atoms.  This split follows from the block size alone, never
from the batch; the slices' partial sums are added in order by the program that arrives last.

Dimension letters: T tokens, k experts per token, E experts, B atoms per block, H hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ROWS = tl.constexpr(16)


@triton.jit
def _load_ids(ids_ptr, T, k, K_PAD: tl.constexpr):
    """All of topk_ids [T, k] as [ROWS, K_PAD] and each place's pair number; −1 outside."""
    i_row = tl.arange(0, ROWS)[:, None]
    i_slot = tl.arange(0, K_PAD)[None, :]
    pair = i_row * k + i_slot
    inside = (i_row < T) & (i_slot < k)
    return tl.load(ids_ptr + pair, mask=inside, other=-1), tl.where(inside, pair, ROWS * K_PAD)


@triton.jit(do_not_specialize=["T", "k", "E", "num_arrivals"])
def gate_up(
    x_ptr,
    weights_ptr,
    ids_ptr,
    w13_ptr,
    block_start_ptr,
    act_ptr,
    plan_ptr,
    arrivals_ptr,
    T,
    k,
    E,
    num_arrivals,
    H: tl.constexpr,
    B: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    MAX_BLOCKS_PAD: tl.constexpr,
    ARRIVALS_PAD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """act [n, ROWS, B] ← weight · silu(x · gateᵀ) ∘ (x · upᵀ) for the blocks of chosen experts.

    The program behind the last tile of pair 0 writes the plan of `down`: the number of chosen blocks, then their
    numbers, experts ascending; and sets its arrival counters to zero.
    """
    if PDL:
        gdc_launch_dependents()
    i_pair = tl.program_id(0)
    i_tile = tl.program_id(1)
    ids, pairs = _load_ids(ids_ptr, T, k, K_PAD)  # [ROWS, K_PAD]
    if i_tile == tl.num_programs(1) - 1:
        if i_pair == 0:
            _write_plan(ids, block_start_ptr, plan_ptr, E, E_PAD, K_PAD, MAX_BLOCKS_PAD)
            i_arrival = tl.arange(0, ARRIVALS_PAD)
            tl.store(arrivals_ptr + i_arrival, 0, mask=i_arrival < num_arrivals)
        return
    expert = tl.load(ids_ptr + i_pair)
    chose = ids == expert
    if tl.sum(tl.sum((chose & (pairs < i_pair)).to(tl.int32), 1), 0) > 0:
        return
    start = tl.load(block_start_ptr + expert).to(tl.int64)
    width = (tl.load(block_start_ptr + expert + 1).to(tl.int64) - start) * B
    if i_tile * BLOCK_A >= width:
        return

    i_row = tl.arange(0, ROWS)
    member = tl.sum(chose.to(tl.int32), 1) > 0  # [ROWS]
    weight = tl.sum(tl.load(weights_ptr + pairs, mask=chose, other=0.0), 1)
    atom = i_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = atom < width
    block = start + atom // B  # [BLOCK_A] int64
    p_gate = w13_ptr + (block * (2 * B) + atom % B)[:, None] * H
    i_h = tl.arange(0, BLOCK_H)
    p_x = x_ptr + i_row[None, :].to(tl.int64) * H
    gate = tl.zeros((BLOCK_A, ROWS), dtype=tl.float32)
    up = tl.zeros((BLOCK_A, ROWS), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        column = h + i_h
        b_x = tl.load(p_x + column[:, None], mask=member[None, :] & (column < H)[:, None], other=0.0)  # [BLOCK_H, ROWS]
        b_mask = inside[:, None] & (column < H)[None, :]
        b_gate = tl.load(p_gate + column[None, :], mask=b_mask, other=0.0, eviction_policy="evict_first")
        b_up = tl.load(p_gate + (B * H + column)[None, :], mask=b_mask, other=0.0, eviction_policy="evict_first")
        gate = tl.dot(b_gate, b_x, gate, input_precision=PRECISION)
        up = tl.dot(b_up, b_x, up, input_precision=PRECISION)
    act = weight[None, :] * (gate / (1.0 + tl.exp(-gate))) * up
    act = tl.where(member[None, :], act, 0.0)
    p_act = act_ptr + (block * (ROWS * B) + atom % B)[:, None] + (i_row * B)[None, :]
    tl.store(p_act, act.to(act_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _write_plan(
    ids, block_start_ptr, plan_ptr, E, E_PAD: tl.constexpr, K_PAD: tl.constexpr, MAX_BLOCKS_PAD: tl.constexpr
):
    named = tl.reshape(ids, (ROWS * K_PAD,))
    expert = tl.arange(0, E_PAD)
    chosen = (tl.histogram(named, E_PAD, mask=named >= 0) > 0) & (expert < E)
    start = tl.load(block_start_ptr + expert, mask=chosen, other=0)
    count = tl.load(block_start_ptr + expert + 1, mask=chosen, other=0) - start  # [E_PAD]
    end = tl.cumsum(count, 0)
    i_block = tl.arange(0, MAX_BLOCKS_PAD)[None, :]
    p_plan = plan_ptr + 1 + (end - count)[:, None] + i_block
    tl.store(plan_ptr, tl.sum(count, 0))
    tl.store(p_plan, start[:, None] + i_block, mask=i_block < count[:, None])


@triton.jit(do_not_specialize=["T"])
def down(
    act_ptr,
    w2_ptr,
    plan_ptr,
    partial_ptr,
    arrivals_ptr,
    out_ptr,
    T,
    H: tl.constexpr,
    B: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [T, H] ← act · w2 over the plan's blocks, one at a step; partial [SPLIT, ROWS, H] fp32 is scratch."""
    SLICE: tl.constexpr = B // SPLIT
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    column = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = tl.arange(0, ROWS)
    atom = i_split * SLICE + tl.arange(0, SLICE)
    inside = (column < H)[None, :]
    if PDL:
        gdc_wait()
    num_blocks = tl.load(plan_ptr)
    sums = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for i_block in range(num_blocks):
        block = tl.load(plan_ptr + 1 + i_block).to(tl.int64)
        b_act = tl.load(act_ptr + block * (ROWS * B) + (i_row * B)[:, None] + atom[None, :])  # [ROWS, SLICE]
        p_w2 = w2_ptr + (block * B + atom)[:, None] * H + column[None, :]
        b_w2 = tl.load(p_w2, mask=inside, other=0.0, eviction_policy="evict_first")  # [SLICE, BLOCK_N]
        sums = tl.dot(b_act, b_w2, sums, input_precision=PRECISION)
    p_out = out_ptr + i_row[:, None].to(tl.int64) * H + column[None, :]
    keep = (i_row < T)[:, None] & (column < H)[None, :]
    if SPLIT == 1:
        tl.store(p_out, sums.to(out_ptr.dtype.element_ty), mask=keep)
    else:
        p_partial = partial_ptr + i_row[:, None] * H + column[None, :]
        tl.store(p_partial + i_split * (ROWS * H), sums, mask=keep)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + i_n, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
            for i in tl.static_range(SPLIT):
                total += tl.load(p_partial + i * (ROWS * H), mask=keep, other=0.0, cache_modifier=".cg")
            tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=keep)
