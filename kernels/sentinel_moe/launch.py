"""The public op: checks its arguments and hands them to the device's kernels, as one node of a compiled graph."""

from __future__ import annotations

import os

import torch

from laguna_serve.kernels.sentinel_moe import cpu
from laguna_serve.kernels.sentinel_moe.reference import SCALED_COLUMNS

MAX_TOPK = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
# Triton decides when a kernel is defined: under TRITON_INTERPRET=1 its kernels run on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCHEMA = (
    "sentinel_moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_blocks, Tensor w2_blocks, "
    "Tensor block_start, Tensor? w13_scales, Tensor? w2_scales, int? max_blocks_per_expert) -> Tensor"
)


def sentinel_moe(
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
    """Routed experts of which only some blocks are kept: neither loads nor computes what was pruned.

    out[t] = Σ_j topk_weights[t, j] · Σ_b (silu(x[t] · gate_bᵀ) ∘ (x[t] · up_bᵀ)) · w2_b over the blocks b of expert
    topk_ids[t, j]; products are summed in fp32, and the weighted activations are rounded to x's dtype once in between.

    With scales the weights are 8-bit: a weight is its value times the scale of its row for its 128 columns, and x keeps
    its dtype. A row of gate or up is summed 128 columns at a time, each sum times its scale; the scales of a row of w2
    multiply its weighted activation, before the rounding where bf16 is multiplied as bf16, after it elsewhere.

    Deterministic. A row's bits do not depend on T or on the other rows: on a CPU for any T, on a GPU for T up to 64
    and, where VLLM_BATCH_INVARIANT is 1, for any T at some cost. No device value is read on the host but
    block_start, once per tensor, if `max_blocks_per_expert` is given, so that a CUDA graph can hold the call. All
    tensors are contiguous and on one device, a CUDA GPU or the CPU.

    Args:
        x: [T, H] bf16, fp16 or fp32; H a multiple of 16.
        topk_weights: [T, k] fp32, k from 1 to 16.
        topk_ids: [T, k] int32, experts from 0 to E − 1, or −1 for none; an expert named twice counts with both weights.
            On a GPU any other number names none either, as checking would cost a synchronisation.
        w13_blocks: [n, 2, B, H] in x's dtype, or float8_e4m3fn with scales: each kept block's gate rows, then its up
            rows; B a multiple of 16.
        w2_blocks: [n, B, H] in the dtype of w13_blocks: the block's down columns, as rows.
        block_start: [E + 1] int32: expert e keeps the blocks start[e]:start[e + 1].
        w13_scales: [n, 2, B, ⌈H / 128⌉] fp32 for 8-bit weights: of each row, one for 128 columns.
        w2_scales: [n, B, ⌈H / 128⌉] fp32 likewise; both or none.
        max_blocks_per_expert: upper bound of start[e + 1] − start[e]. None reads it from the device.

    Returns:
        [T, H] in x's dtype.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above.
        IndexError: an entry of block_start is out of range (on a CPU of a chosen expert); on a CPU also an expert id.
        RuntimeError: `max_blocks_per_expert` is None while a CUDA graph is captured, or a gradient is asked for.
    """
    try:
        out: torch.Tensor = torch.ops.laguna_serve.sentinel_moe.default(
            x,
            topk_weights,
            topk_ids,
            w13_blocks,
            w2_blocks,
            block_start,
            w13_scales,
            w2_scales,
            max_blocks_per_expert,
        )
    except ValueError:
        # The kernels of a CPU say that something is wrong, and leave it to this to find what.
        _find_fault(
            x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert
        )
        raise
    return out


def _check(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    max_blocks_per_expert: int | None,
) -> None:
    """All at once, as this runs in every layer of every step on a CPU; `_find_fault` then says what is wrong."""
    dtype, device = x.dtype, x.device
    weight_dtype = dtype if w13_scales is None else FP8
    good = (
        dtype in DTYPES
        and topk_weights.dtype == torch.float32
        and topk_ids.dtype == block_start.dtype == torch.int32
        and w13_blocks.dtype == w2_blocks.dtype == weight_dtype
        and topk_weights.device == topk_ids.device == w13_blocks.device == w2_blocks.device == device
        and block_start.device == device
        and x.is_contiguous()
        and topk_weights.is_contiguous()
        and topk_ids.is_contiguous()
        and w13_blocks.is_contiguous()
        and w2_blocks.is_contiguous()
        and block_start.is_contiguous()
        and (max_blocks_per_expert is None or max_blocks_per_expert > 0)
        and _fits(x.shape, topk_weights.shape, topk_ids.shape, w13_blocks.shape, w2_blocks.shape, block_start.shape)
        and _scales_fit(w13_blocks, w13_scales)
        and _scales_fit(w2_blocks, w2_scales)
        and (w13_scales is None) == (w2_scales is None)
    )
    if not good:
        _find_fault(
            x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert
        )
        raise AssertionError("sentinel_moe: arguments that are refused without a reason")


def _fits(
    x: torch.Size, weights: torch.Size, ids: torch.Size, w13: torch.Size, w2: torch.Size, start: torch.Size
) -> bool:
    if len(x) != 2 or len(ids) != 2 or len(w2) != 3 or len(start) != 1:
        return False
    (T, H), k, (n, B, _) = x, ids[1], w2
    multiples = H > 0 and B > 0 and H % 16 == 0 and B % 16 == 0
    shapes = ids[0] == T and weights == ids and w13 == (n, 2, B, H) and w2[2] == H
    return multiples and shapes and 1 <= k <= MAX_TOPK and start[0] > 1


def _scales_fit(blocks: torch.Tensor, scales: torch.Tensor | None) -> bool:
    return scales is None or (
        scales.dtype == torch.float32
        and scales.device == blocks.device
        and scales.is_contiguous()
        and scales.shape == (*blocks.shape[:-1], -(-blocks.shape[-1] // SCALED_COLUMNS))
    )


def _find_fault(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    max_blocks_per_expert: int | None,
) -> None:
    _expect(x.dim() == 2, "x", "2 dimensions [T, H]", x.dim())
    _expect(topk_ids.dim() == 2, "topk_ids", "2 dimensions [T, k]", topk_ids.dim())
    _expect(w2_blocks.dim() == 3, "w2_blocks", "3 dimensions [n, B, H]", w2_blocks.dim())
    T, H = x.shape
    k = topk_ids.shape[1]
    n, B, _ = w2_blocks.shape
    _expect(H % 16 == 0 and H > 0, "x", "a hidden size that is a multiple of 16", H)
    _expect(1 <= k <= MAX_TOPK, "topk_ids", f"1 to {MAX_TOPK} experts per token", k)
    _expect(B % 16 == 0 and B > 0, "w2_blocks", "a block size that is a multiple of 16", B)
    _expect(block_start.dim() == 1 and len(block_start) > 1, "block_start", "[E + 1]", list(block_start.shape))
    _expect(
        max_blocks_per_expert is None or max_blocks_per_expert > 0,
        "max_blocks_per_expert",
        "at least 1",
        max_blocks_per_expert,
    )
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected dtype bfloat16, float16 or float32, got {x.dtype}; convert it")
    scaled = {"w13_scales": w13_scales, "w2_scales": w2_scales}
    if w13_blocks.dtype == FP8:
        for name, scales in scaled.items():
            _expect(scales is not None, name, "scales for 8-bit weights", None)
    else:
        for name, scales in scaled.items():
            _expect(scales is None, name, f"none for weights of {w13_blocks.dtype}", "some")
    weight_dtype = FP8 if w13_blocks.dtype == FP8 else x.dtype
    groups = -(-H // SCALED_COLUMNS)
    for name, tensor, shape, dtype in (
        ("x", x, (T, H), x.dtype),
        ("topk_weights", topk_weights, (T, k), torch.float32),
        ("topk_ids", topk_ids, (T, k), torch.int32),
        ("w13_blocks", w13_blocks, (n, 2, B, H), weight_dtype),
        ("w2_blocks", w2_blocks, (n, B, H), weight_dtype),
        ("block_start", block_start, tuple(block_start.shape), torch.int32),
        ("w13_scales", w13_scales, (n, 2, B, groups), torch.float32),
        ("w2_scales", w2_scales, (n, B, groups), torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}; convert it")
        _expect(tensor.shape == shape, name, f"shape {list(shape)}", list(tensor.shape))
        _expect(tensor.is_contiguous(), name, "contiguous", f"strides {tensor.stride()}")
        _expect(tensor.device == x.device, name, f"device {x.device}, that of x", tensor.device)


def _expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}; see sentinel_moe's arguments")


def _run_without_kernels(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    max_blocks_per_expert: int | None,
) -> torch.Tensor:
    """Where no kernel is registered: on a CPU before its library is loaded, or for good if it cannot be."""
    if INTERPRETED:
        return _run_triton(
            x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert
        )
    _check(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert)
    if x.device.type != "cpu":
        raise ValueError(f"x: expected a tensor on a CPU or a CUDA device, got {x.device}; move it")
    if cpu.load() is None:
        return cpu.run_torch(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales)
    return sentinel_moe(
        x,
        topk_weights,
        topk_ids,
        w13_blocks,
        w2_blocks,
        block_start,
        w13_scales=w13_scales,
        w2_scales=w2_scales,
        max_blocks_per_expert=max_blocks_per_expert,
    )


def _run_triton(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    max_blocks_per_expert: int | None,
) -> torch.Tensor:
    from laguna_serve.kernels.sentinel_moe import gpu  # imports triton, which a CPU need not have

    _check(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert)
    if max_blocks_per_expert is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("max_blocks_per_expert: expected a number in a CUDA graph, got None; pass the bound")
        max_blocks_per_expert = max(1, int(block_start.diff().max()))
    return gpu.run(
        x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, w13_scales, w2_scales, max_blocks_per_expert
    )


def _run_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _refuse_gradient(ctx: object, inputs: object, output: object) -> None:
    remedy = "call it under torch.no_grad(), or train with sentinel_moe_reference"
    raise RuntimeError(f"sentinel_moe: expected inputs without gradients, got some that require them; {remedy}")


_library = torch.library.Library("laguna_serve", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
# The library of a CPU registers itself, before which this stands in for it.
_library.impl("sentinel_moe", _run_without_kernels, "CompositeExplicitAutograd")
_library.impl("sentinel_moe", _run_triton, "CUDA")
torch.library.register_fake("laguna_serve::sentinel_moe", _run_fake, lib=_library)
torch.library.register_autograd(
    "laguna_serve::sentinel_moe", lambda ctx, grad: None, setup_context=_refuse_gradient, lib=_library
)
