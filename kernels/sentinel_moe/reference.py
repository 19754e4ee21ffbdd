"""The specification of `sentinel_moe`, in plain torch and fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SCALED_COLUMNS = 128  # of a row of 8-bit weights have one scale


def sentinel_moe_reference(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    *,
    w13_scales: torch.Tensor | None = None,
    w2_scales: torch.Tensor | None = None,
    max_blocks_per_expert: int | None = None,
) -> torch.Tensor:
    """Routed experts of which only some blocks are kept; arguments and result as `sentinel_moe`, computed in fp32.

    out[t] = Σ_j topk_weights[t, j] · Σ_b (silu(x[t] · gate_bᵀ) ∘ (x[t] · up_bᵀ)) · w2_b over the blocks b of expert
    topk_ids[t, j]. The result is rounded to x's dtype once, at the end.
    """
    H = x.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = block_start.tolist()
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        blocks = slice(start[expert], start[expert + 1])
        gate, up = dequantise(w13_blocks, w13_scales, blocks).transpose(0, 1).reshape(2, -1, H)
        down = dequantise(w2_blocks, w2_scales, blocks).reshape(-1, H)
        inputs = x[rows].float()
        hidden = F.silu(inputs @ gate.t()) * (inputs @ up.t())
        out.index_add_(0, rows, (hidden @ down) * topk_weights[rows, slots, None])
    return out.to(x.dtype)


def dequantise(
    weights: torch.Tensor, scales: torch.Tensor | None, blocks: slice = slice(None), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Widen some of the blocks [n, ..., H] to `dtype`, by their scales [n, ..., ⌈H / 128⌉] if they have any."""
    values = weights[blocks].to(dtype)
    if scales is None:
        return values
    return values * scales[blocks].to(dtype).repeat_interleave(SCALED_COLUMNS, dim=-1)[..., : values.shape[-1]]
