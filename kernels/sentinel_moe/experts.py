"""Triton kernels of the routed experts: what was pruned is neither loaded nor computed, and a row's bits are its own.

The members of an expert are the (token, slot) pairs that chose it, gathered into tiles of MEMBERS columns. A product
is of one shape whatever is in it, and each of its columns is its own: so a pair's result depends on neither the number
of tokens nor the other members. It is kept in fp32, and `combine` adds a token's pairs in the order of its slots.
Nothing of an expert reaches a row that did not choose it, not even its NaN; an id outside 0 to E − 1 is no pair at all.

`gate_up` has a program for each (tile, range of atoms), `down` for each (tile, range of columns, part of the expert's
blocks). Where the pairs are few, a program of `gate_up` finds its members itself among the ids: tile i is led by pair
i if that is the first of MEMBERS that share its expert, and else is empty. Where they are many, `group` has listed
them. The same kernels decode and prefill: configs.py holds the tiles of both.

8-bit weights (e4m3 as uint8) carry a scale for each row and 128 hidden columns: `gate_up` multiplies the product of 128
columns by it, `down` the activation, in fp32 and before its one rounding.

Dimension letters: T tokens, k experts per token, P = T · k pairs, E experts, n blocks in all, B atoms per block, H
hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from laguna_serve.kernels.sentinel_moe.e4m3 import widen, widen_high, widen_low

GROUP = tl.constexpr(128)


@triton.jit
def find_blocks(block_start_ptr, expert, n, max_blocks):
    """First kept block of an expert and their number, held to what the weights have and the grid covers."""
    start = tl.minimum(tl.maximum(tl.load(block_start_ptr + expert), 0), n)
    end = tl.minimum(tl.load(block_start_ptr + expert + 1), n)
    return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), max_blocks)


@triton.jit(do_not_specialize=["P", "k", "E", "n", "max_blocks"])
def gate_up(
    x_ptr,
    weights_ptr,
    ids_ptr,
    w13_ptr,
    scales_ptr,
    block_start_ptr,
    act_ptr,
    members_ptr,
    experts_ptr,
    P,
    k,
    E,
    n,
    max_blocks,
    act_stride,
    H: tl.constexpr,
    B: tl.constexpr,
    P_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LISTED: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """act [P, act_stride] ← weight · silu(x · gateᵀ) ∘ (x · upᵀ), a row for every pair.

    members [tiles, MEMBERS] and experts [tiles] describe the tiles: read where LISTED, else written for `down`.
    """
    if PDL:
        gdc_launch_dependents()
    i_tile = tl.program_id(0)
    i_atoms = tl.program_id(1)
    column = tl.arange(0, MEMBERS)
    pair = tl.arange(0, P_PAD)
    if LISTED:
        expert = tl.load(experts_ptr + i_tile)
        if expert < 0:
            return
        members = tl.load(members_ptr + i_tile * MEMBERS + column)
    else:
        expert = tl.load(ids_ptr + i_tile)
        chose = tl.load(ids_ptr + pair, mask=pair < P, other=-1) == expert
        before = tl.sum((chose & (pair < i_tile)).to(tl.int32), 0)
        leads = (before % MEMBERS == 0) & (expert >= 0) & (expert < E)
        if i_atoms == 0:
            tl.store(experts_ptr + i_tile, tl.where(leads, expert, -1))
        if leads == 0:
            return
    start, count = find_blocks(block_start_ptr, expert, n, max_blocks)
    width = count * B
    if i_atoms * BLOCK_A >= tl.maximum(width, 1):
        return
    if not LISTED:
        place = tl.cumsum(chose.to(tl.int32), 0) - 1 - before  # [P_PAD]
        is_member = chose[:, None] & (place[:, None] == column[None, :])
        members = tl.sum(tl.where(is_member, pair[:, None] + 1, 0), 0) - 1
        if i_atoms == 0:
            tl.store(members_ptr + i_tile * MEMBERS + column, members)

    there = members >= 0  # [MEMBERS]
    weight = tl.load(weights_ptr + members, mask=there, other=0.0)
    i_row = tl.arange(0, 2 * BLOCK_A)  # gate rows, then up rows
    atom = i_atoms * BLOCK_A + i_row % BLOCK_A
    row = (start + atom // B) * (2 * B) + (i_row // BLOCK_A) * B + atom % B  # int64
    inside = atom < width
    p_w13 = w13_ptr + row[:, None] * H
    i_h = tl.arange(0, BLOCK_H)
    p_x = x_ptr + (tl.maximum(members, 0) // k).to(tl.int64)[None, :] * H
    sums = tl.zeros((2 * BLOCK_A, MEMBERS), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        hidden = h + i_h
        b_x = tl.load(p_x + hidden[:, None], mask=there[None, :] & (hidden < H)[:, None], other=0.0)
        b_mask = inside[:, None] & (hidden < H)[None, :]
        b_w = tl.load(p_w13 + hidden[None, :], mask=b_mask, other=0.0, eviction_policy="evict_first")
        if SCALED:
            scale = tl.load(scales_ptr + row * tl.cdiv(H, GROUP) + h // GROUP, mask=inside, other=0.0)
            part = tl.dot(widen(b_w, b_x.dtype, PTX), b_x, input_precision=PRECISION)
            sums += part * scale[:, None]
        else:
            sums = tl.dot(b_w, b_x, sums, input_precision=PRECISION)
    halves = tl.permute(tl.reshape(sums, (2, BLOCK_A, MEMBERS)), (1, 2, 0))
    gate, up = tl.split(halves)  # [BLOCK_A, MEMBERS] each
    act = weight[None, :] * (gate / (1.0 + tl.exp(-gate))) * up
    i_atom = i_atoms * BLOCK_A + tl.arange(0, BLOCK_A)
    p_act = act_ptr + members.to(tl.int64)[None, :] * act_stride + i_atom[:, None]
    tl.store(p_act, act.to(act_ptr.dtype.element_ty), mask=(i_atom < width)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["P", "n", "max_blocks"])
def down(
    act_ptr,
    w2_ptr,
    scales_ptr,
    block_start_ptr,
    members_ptr,
    experts_ptr,
    pair_out_ptr,
    P,
    n,
    max_blocks,
    act_stride,
    first_column,
    columns,
    H: tl.constexpr,
    B: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    SHIFT: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """pair_out [PARTS, P, columns] fp32 ← act · w2, of the hidden columns from first_column on.

    A part is a range of the expert's own blocks: which they are follows from its width alone.
    """
    ROWS: tl.constexpr = MEMBERS if MEMBERS > 16 else 16  # the least that the matrix units take
    i_tile = tl.program_id(0)
    i_n = tl.program_id(1)
    i_part = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(experts_ptr + i_tile)
    if expert < 0:
        return
    start, count = find_blocks(block_start_ptr, expert, n, max_blocks)
    first = (count * i_part // PARTS) * B
    end = (count * (i_part + 1) // PARTS) * B
    i_row = tl.arange(0, ROWS)
    members = tl.load(members_ptr + i_tile * MEMBERS + i_row, mask=i_row < MEMBERS, other=-1)
    there = members >= 0
    i_k = tl.arange(0, BLOCK_K)
    p_act = act_ptr + tl.maximum(members, 0).to(tl.int64)[:, None] * act_stride
    i_column = first_column + i_n * BLOCK_N
    if SCALED:
        # Two neighbouring columns are one uint16, so that bytes need not be transposed one by one.
        i_word = i_column // 2 + tl.arange(0, BLOCK_N // 2)
        p_w2 = w2_ptr + start * B * (H // 2) + i_word[None, :]
        p_scale = scales_ptr + start * B * tl.cdiv(H, GROUP) + i_column // GROUP
        even = tl.zeros((ROWS, BLOCK_N // 2), dtype=tl.float32)
        odd = tl.zeros((ROWS, BLOCK_N // 2), dtype=tl.float32)
        for k in range(first, end, BLOCK_K):
            atom = k + i_k
            inside = atom < end
            wide = tl.load(p_act + atom[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            scale = tl.load(p_scale + atom * tl.cdiv(H, GROUP), mask=inside, other=0.0)
            b_act = (wide * (scale * SHIFT)[None, :]).to(COMPUTE)  # [ROWS, BLOCK_K]
            b_mask = inside[:, None] & (i_word < H // 2)[None, :]
            p_pairs = p_w2 + atom[:, None].to(tl.int64) * (H // 2)
            pairs = tl.load(p_pairs, mask=b_mask, other=0, eviction_policy="evict_first")
            even = tl.dot(b_act, widen_low(pairs, COMPUTE, PTX), even, input_precision=PRECISION)
            odd = tl.dot(b_act, widen_high(pairs, COMPUTE, PTX), odd, input_precision=PRECISION)
        sums = tl.reshape(tl.join(even, odd), (ROWS, BLOCK_N)) * (1.0 / SHIFT)
    else:
        column = i_column + tl.arange(0, BLOCK_N)
        p_w2 = w2_ptr + start * B * H + column[None, :]
        sums = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
        for k in range(first, end, BLOCK_K):
            atom = k + i_k
            inside = atom < end
            b_act = tl.load(p_act + atom[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            b_mask = inside[:, None] & (column < H)[None, :]
            p_rows = p_w2 + atom[:, None].to(tl.int64) * H
            b_w = tl.load(p_rows, mask=b_mask, other=0.0, eviction_policy="evict_first")
            sums = tl.dot(b_act, b_w, sums, input_precision=PRECISION)
    column = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = pair_out_ptr + (i_part * P + tl.maximum(members, 0)).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(p_out, sums, mask=there[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["P", "E"])
def combine(
    pair_out_ptr,
    ids_ptr,
    out_ptr,
    P,
    E,
    first_column,
    columns,
    H: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [T, H] ← the sum of a token's pairs, slots ascending, and of each pair's parts, ascending.

    pair_out [PARTS, P, columns] fp32 is of the columns from first_column on.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        gdc_wait()
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(K):
        pair = token * K + slot
        expert = tl.load(ids_ptr + pair)
        there = tl.where((expert >= 0) & (expert < E), columns, 0)
        for part in tl.static_range(PARTS):
            p_pair = pair_out_ptr + (part * P + pair).to(tl.int64) * columns
            total += tl.load(p_pair + column, mask=column < there, other=0.0)
    p_out = out_ptr + token.to(tl.int64) * H + first_column + column
    tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["P", "E", "tiles"])
def group(
    ids_ptr,
    members_ptr,
    experts_ptr,
    P,
    E,
    tiles,
    E_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """members [tiles, MEMBERS] and experts [tiles] of all pairs, experts and pairs ascending; a program per expert.

    Each counts the pairs of all experts for itself, to know where its own tiles begin. The last one marks as empty,
    by expert −1, the tiles that are left over.
    """
    expert = tl.program_id(0)
    i_chunk = tl.arange(0, CHUNK)
    i_expert = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for first in range(0, P, CHUNK):
        pair = first + i_chunk
        ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
        counts += tl.histogram(ids, E_PAD, mask=(ids >= 0) & (ids < E))
    needed = (counts + MEMBERS - 1) // MEMBERS
    begin = tl.sum(tl.where(i_expert < expert, needed, 0), 0)
    end = begin + tl.sum(tl.where(i_expert == expert, needed, 0), 0)
    place = begin * MEMBERS
    for first in range(0, P, CHUNK):
        pair = first + i_chunk
        chose = (tl.load(ids_ptr + pair, mask=pair < P, other=-1) == expert).to(tl.int32)
        tl.store(members_ptr + place + tl.cumsum(chose, 0) - 1, pair, mask=chose > 0)
        place += tl.sum(chose, 0)
    rest = place + tl.arange(0, MEMBERS)
    tl.store(members_ptr + rest, -1, mask=rest < end * MEMBERS)
    for tile in range(begin, end):
        tl.store(experts_ptr + tile, expert)
    if expert == E - 1:
        for tile in range(end, tiles):
            tl.store(experts_ptr + tile, -1)
