"""Scratch memory, grids and the choice of path for the Triton kernels.

Everything launched depends on shapes alone, so that a CUDA graph can hold a call, and all scratch comes from torch's
allocator on the current stream, so that calls on several streams do not share it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from laguna_serve.kernels.sentinel_moe import experts
from laguna_serve.kernels.sentinel_moe.bounds import check_block_start
from laguna_serve.kernels.sentinel_moe.configs import TABLE, Path, Tiles, Weights, kind_of_weights
from laguna_serve.kernels.sentinel_moe.tables import find_table

# Up to here a program finds an expert's members itself, and the tiles are those of one token.
DECODE_TOKENS = 64
# vLLM's own switch, which `laguna serve --exact` sets: the tiles of one token for any number of them.
EXACT = "VLLM_BATCH_INVARIANT"
# Of the pairs' results in fp32: more are made and summed a range of columns at a time.
PAIR_OUT_BYTES = 256 * 2**20
# Of activations: 32,768 tokens of 8 experts of 512 in 16 bits. More go in pieces, each of which reads all weights.
ACT_BYTES = 256 * 2**20
COMBINED_COLUMNS = 512
LISTED_AT_ONCE = 1024
# Weighted activations times scales are small: kept off fp16's subnormals by this power of two, taken back from the sum.
FP16_SHIFT = 1024
COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A layer's kept experts, as in launch.py; at most `most` blocks each."""

    w13: torch.Tensor
    w2: torch.Tensor
    start: torch.Tensor
    w13_scales: torch.Tensor | None
    w2_scales: torch.Tensor | None
    most: int

    @property
    def scaled(self) -> bool:
        """Whether the weights are 8-bit."""
        return self.w13_scales is not None

    @property
    def num_experts(self) -> int:
        """E, of which some may have kept nothing."""
        return self.start.numel() - 1


def run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    max_blocks: int,
) -> torch.Tensor:
    """Run the op for checked tensors (shapes as in launch.py); the first look at a block_start reads it on the host.

    Raises:
        IndexError: block_start does not ascend within the weights, or an expert has more than `max_blocks`.
    """
    blocks = Blocks(w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks)
    check_block_start(block_start, len(w2_blocks), max_blocks)
    out = torch.empty_like(x)
    T, k = topk_ids.shape
    if T == 0:
        return out
    exact = T <= DECODE_TOKENS or is_exact()
    tiles = choose_tiles(x.device, "decode" if exact else "prefill", kind_of_weights(x.dtype, w13_blocks.dtype))
    width = max_blocks * w2_blocks.shape[1]
    at_once = max(DECODE_TOKENS, ACT_BYTES // (k * width * (4 if blocks.scaled else x.element_size())))
    for first in range(0, T, at_once):
        rows = slice(first, first + at_once)
        run_tokens(x[rows], topk_weights[rows], topk_ids[rows], blocks, tiles, out[rows])
    return out


def run_tokens(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    out: torch.Tensor,
) -> None:
    """Three launches, four where an expert's members have to be listed, two more for each further range of columns."""
    pairs, H = topk_ids.numel(), x.shape[1]
    members, owners = list_members(topk_ids, blocks.num_experts, tiles.members)
    act = x.new_empty(pairs, blocks.most * blocks.w2.shape[1], dtype=torch.float32 if blocks.scaled else x.dtype)
    run_gate_up(x, topk_weights, topk_ids, blocks, tiles, members, owners, act)
    fitting = PAIR_OUT_BYTES // (tiles.parts * pairs * 4) // tiles.block_n * tiles.block_n
    columns = min(H, max(tiles.block_n, fitting))
    pair_out = torch.empty(tiles.parts * pairs * columns, dtype=torch.float32, device=x.device)
    for first in range(0, H, columns):
        window = (first, min(columns, H - first))
        run_down(act, blocks, tiles, members, owners, pair_out, window, COMPUTE[x.dtype])
        run_combine(pair_out, topk_ids, blocks.num_experts, tiles.parts, window, out)


def list_members(topk_ids: torch.Tensor, num_experts: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """members [tiles, size] and owners [tiles], listed already where there are more than DECODE_TOKENS tokens."""
    pairs = topk_ids.numel()
    listed = is_listed(topk_ids)
    most = pairs // size + min(num_experts, pairs) if listed else pairs
    members = torch.empty(most, size, dtype=torch.int32, device=topk_ids.device)
    owners = torch.empty(most, dtype=torch.int32, device=topk_ids.device)
    if listed:
        experts.group[(num_experts,)](
            topk_ids,
            members,
            owners,
            pairs,
            num_experts,
            most,
            E_PAD=triton.next_power_of_2(num_experts),
            MEMBERS=size,
            CHUNK=LISTED_AT_ONCE,
        )
    return members, owners


def is_listed(topk_ids: torch.Tensor) -> bool:
    """Whether `group` lists the members, rather than each program of `gate_up` finding its own."""
    return topk_ids.shape[0] > DECODE_TOKENS


def run_gate_up(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    members: torch.Tensor,
    owners: torch.Tensor,
    act: torch.Tensor,
) -> None:
    """act [P, most · B]: the weighted activations of every pair."""
    pairs, k = topk_ids.numel(), topk_ids.shape[1]
    n, B, H = blocks.w2.shape
    listed = is_listed(topk_ids)
    experts.gate_up[(owners.numel(), triton.cdiv(act.shape[1], tiles.block_a))](
        x,
        topk_weights,
        topk_ids,
        blocks.w13.view(torch.uint8) if blocks.scaled else blocks.w13,
        topk_weights if blocks.w13_scales is None else blocks.w13_scales,
        blocks.start,
        act,
        members,
        owners,
        pairs,
        k,
        blocks.num_experts,
        n,
        blocks.most,
        act.stride(0),
        H=H,
        B=B,
        P_PAD=16 if listed else max(16, triton.next_power_of_2(pairs)),
        MEMBERS=tiles.members,
        BLOCK_A=tiles.block_a,
        BLOCK_H=tiles.block_h,
        LISTED=listed,
        SCALED=blocks.scaled,
        PTX=_has_ptx(x.device),
        PRECISION="ieee",
        PDL=_has_dependent_launch(x.device),
        num_warps=tiles.warps[0],
        num_stages=tiles.stages[0],
    )


def run_down(
    act: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    members: torch.Tensor,
    owners: torch.Tensor,
    pair_out: torch.Tensor,
    window: tuple[int, int],
    compute: tl.dtype,
) -> None:
    """pair_out [parts, P, columns]: the pairs' results for a window (first column, columns) of the hidden size."""
    n, B, H = blocks.w2.shape
    dependent_launch = _has_dependent_launch(act.device)
    experts.down[(owners.numel(), triton.cdiv(window[1], tiles.block_n), tiles.parts)](
        act,
        blocks.w2.view(torch.int16) if blocks.scaled else blocks.w2,
        pair_out if blocks.w2_scales is None else blocks.w2_scales,
        blocks.start,
        members,
        owners,
        pair_out,
        act.shape[0],
        n,
        blocks.most,
        act.stride(0),
        *window,
        H=H,
        B=B,
        MEMBERS=tiles.members,
        PARTS=tiles.parts,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SCALED=blocks.scaled,
        COMPUTE=compute,
        SHIFT=FP16_SHIFT if compute == tl.float16 else 1,
        PTX=_has_ptx(act.device),
        PRECISION="ieee",
        PDL=dependent_launch,
        num_warps=tiles.warps[1],
        num_stages=tiles.stages[1],
        **({"launch_pdl": True} if dependent_launch else {}),
    )


def run_combine(
    pair_out: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    parts: int,
    window: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """Write the window's columns of out [T, H]."""
    T, k = topk_ids.shape
    dependent_launch = _has_dependent_launch(out.device)
    experts.combine[(T, triton.cdiv(window[1], COMBINED_COLUMNS))](
        pair_out,
        topk_ids,
        out,
        topk_ids.numel(),
        num_experts,
        *window,
        H=out.shape[1],
        K=k,
        PARTS=parts,
        BLOCK_N=COMBINED_COLUMNS,
        PDL=dependent_launch,
        num_warps=4,
        **({"launch_pdl": True} if dependent_launch else {}),
    )


@functools.cache
def choose_tiles(device: torch.device, path: Path, weights: Weights) -> Tiles:
    """Choose the row for a device: as measured on its like, if that was done."""
    return (find_table(torch.cuda.get_device_name(device)) if device.type == "cuda" else TABLE)[path, weights]


@functools.cache
def is_exact() -> bool:
    """Whether a row's bits are to be the same for any number of tokens, at some cost above DECODE_TOKENS of them."""
    return os.environ.get(EXACT, "0") not in ("", "0")


@functools.cache
def _has_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    """Programmatic dependent launch: NVIDIA's, from Hopper on."""
    return _has_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)
