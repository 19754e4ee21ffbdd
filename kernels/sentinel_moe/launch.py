"""The public op: checks its arguments and hands them to the device's kernel, as one node of a compiled graph."""

from __future__ import annotations

import torch

from laguna_serve.kernels.sentinel_moe import cpu

MAX_TOPK = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sentinel_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    *,
    max_blocks_per_expert: int | None = None,
) -> torch.Tensor:
    """Routed experts of which only some blocks are kept.

    Args:
        x: [T, H] bf16, fp16 or fp32, H a multiple of 16.
        topk_weights: [T, k] fp32, k up to 16.
        topk_ids: [T, k] int32, expert numbers.
        w13_blocks: [n, 2, B, H], gate rows then up rows of each kept block, B a multiple of 16.
        w2_blocks: [n, B, H], the matching down columns as rows.
        block_start: [E + 1] int32; the blocks of expert e are start[e]:start[e + 1].
        max_blocks_per_expert: an upper bound of start[e + 1] − start[e] known on the host.

    Returns:
        [T, H] in x's dtype, as `sentinel_moe_reference` specifies it.
    """
    _check(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start)
    return torch.ops.laguna_serve.sentinel_moe(
        x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, max_blocks_per_expert
    )


def _check(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start):
    pass


_library = torch.library.Library("laguna_serve", "FRAGMENT")
_library.define(
    "sentinel_moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_blocks, Tensor w2_blocks, "
    "Tensor block_start, int? max_blocks_per_expert) -> Tensor",
)


def _run_cpu(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, max_blocks_per_expert):
    return cpu.run(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start)


_library.impl("sentinel_moe", _run_cpu, "CPU")
_library.impl("sentinel_moe", lambda x, *_: torch.empty_like(x), "Meta")
