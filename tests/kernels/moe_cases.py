"""Inputs of the sentinel MoE op, and how far a result may lie from the reference."""

from __future__ import annotations

from typing import NamedTuple

import torch

from laguna_serve.kernels.sentinel_moe.reference import dequantise

# ‖out − reference‖ ÷ ‖reference‖. fp32 differs in the order of its sums; fp16 and bf16 by the one rounding of the
# weighted activations and that of the result, 2⁻¹¹ and 2⁻⁸ relative each.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


class Inputs(NamedTuple):
    """The op's tensors, in its order."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    w13_blocks: torch.Tensor
    w2_blocks: torch.Tensor
    block_start: torch.Tensor

    def rows(self, rows: slice) -> Inputs:
        """The same experts with some of the tokens."""
        tokens = (tensor[rows].contiguous() for tensor in self[:3])
        return Inputs(*tokens, *self[3:])


def make_inputs(
    T: int,
    H: int,
    B: int,
    widths: list[int],
    k: int,
    dtype: torch.dtype,
    *,
    ids: torch.Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Inputs:
    """Random inputs; `widths` are the experts' kept blocks, `ids` [T, k] fixes the routing."""
    torch.manual_seed(seed)
    E, n = len(widths), sum(widths)
    start = torch.tensor([0, *widths]).cumsum(0).to(torch.int32)
    if ids is None:
        ids = torch.stack([torch.randperm(E)[:k] for _ in range(T)]) if T else torch.empty(0, k)
    inputs = Inputs(
        torch.randn(T, H).to(dtype),
        torch.rand(T, k),
        ids.to(torch.int32),
        (torch.randn(n, 2, B, H) / H**0.5).to(dtype),
        (torch.randn(n, B, H) / B**0.5).to(dtype),
        start,
    )
    return Inputs(*(tensor.to(device) for tensor in inputs))


def quantise(inputs: Inputs) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """The layer with 8-bit weights, and the scales of each row's 128 columns as the op's keywords."""

    def split(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        H = blocks.shape[-1]
        groups = -(-H // 128)
        columns = torch.nn.functional.pad(blocks.float(), (0, groups * 128 - H)).unflatten(-1, (groups, 128))
        scales = columns.abs().amax(-1).clamp_min(1e-6) / 448
        values = (columns / scales[..., None]).flatten(-2)[..., :H].contiguous()
        return values.to(torch.float8_e4m3fn), scales

    (w13, w13_scales), (w2, w2_scales) = split(inputs.w13_blocks), split(inputs.w2_blocks)
    return inputs._replace(w13_blocks=w13, w2_blocks=w2), {"w13_scales": w13_scales, "w2_scales": w2_scales}


def in_fp64(
    inputs: Inputs, w13_scales: torch.Tensor | None = None, w2_scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, expert by expert in fp64."""
    x, weights, ids, w13, w2, start = inputs
    H = x.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        blocks = slice(int(start[expert]), int(start[expert + 1]))
        rows = dequantise(w13, w13_scales, blocks, torch.float64).transpose(0, 1).reshape(2, -1, H)
        gate, up = (x.double() @ part.t() for part in rows)
        share = (weights * (ids == expert)).sum(1, dtype=torch.float64)[:, None]
        down = dequantise(w2, w2_scales, blocks, torch.float64).reshape(-1, H)
        out += share * (gate * gate.sigmoid() * up @ down)
    return out


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ ÷ ‖reference‖ in fp64; NaN if anything is."""
    difference, scale = (out.double() - reference.double()).norm(), reference.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


# Name → (H, B, kept blocks of the experts, k).
SHAPES = {
    "toy": (160, 16, [8, 7, 1, 3, 5, 8, 2, 6, 4, 8, 8, 1, 7, 5, 3, 6], 4),
    "one block each": (48, 16, [1] * 6, 3),
    "an expert without blocks": (64, 32, [0, 3, 0, 2, 5], 3),
    "block 64": (96, 64, [2, 1, 3], 2),
    "block 48": (80, 48, [2, 4, 1, 1], 2),
    "one expert": (32, 16, [3], 1),
    "16 experts per token": (32, 16, [1, 2, 1, 3] * 5, 16),
}
# Name → expert ids [T, k] for T tokens, k = 2 of 5 experts.
ROUTINGS = {
    "all to one expert": lambda T: torch.tensor([3, 1]).expand(T, 2),
    "an expert twice": lambda T: torch.tensor([2, 2]).expand(T, 2),
    "all different": lambda T: torch.arange(2 * T).reshape(T, 2) % 5,
}
ROUTING_SHAPE = (48, 16, [2, 1, 3, 1, 4])
