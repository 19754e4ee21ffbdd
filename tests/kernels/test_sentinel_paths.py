"""Every path of the CPU library that this processor can run, forced: against fp64, row bits, one token's NaN."""

from __future__ import annotations

import pytest
import torch
from moe_cases import DTYPES, ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, in_fp64, make_inputs, relative_error

from laguna_serve.kernels.sentinel_moe import sentinel_moe

# H ends in half a step of the widest registers; blocks beyond 64 and wide enough for several threads.
WIDE = {
    "rest of 16": (2064, 64, [2, 1, 2], 2),
    "block 256": (272, 256, [1, 2], 2),
    "block 112": (48, 112, [2, 1, 0], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE])
def test_path_computes_the_definition(shape: str, dtype: torch.dtype, native_path: str) -> None:
    H, B, widths, k = (SHAPES | WIDE)[shape]
    for T in (0, 1, 7, 17, 70):
        inputs = make_inputs(T, H, B, widths, k, dtype)
        out = sentinel_moe(*inputs)
        assert out.dtype == dtype
        assert relative_error(out, in_fp64(inputs)) < TOLERANCE[dtype], T


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "block 48", "16 experts per token", "rest of 16"])
def test_a_rows_bits_depend_on_neither_batch_nor_threads(shape: str, dtype: torch.dtype, native_path: str) -> None:
    H, B, widths, k = (SHAPES | WIDE)[shape]
    inputs = make_inputs(300, H, B, widths, k, dtype)
    whole = sentinel_moe(*inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (
                *(slice(i, i + 1) for i in (0, 3, 299)),
                slice(2, 9),
                slice(0, 17),
                slice(7, 64),
                slice(0, 257),
            ):
                assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, native_path: str) -> None:
    for T in (1, 20):
        inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32, ids=ROUTINGS[routing](T))
        assert relative_error(sentinel_moe(*inputs), in_fp64(inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("T", [4, 40])
def test_one_tokens_nan_stays_its_own(T: int, value: float, dtype: torch.dtype, native_path: str) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, dtype)
    clean = sentinel_moe(*inputs)
    others = [t for t in range(T) if t != 1]
    for poisoned in (inputs.x, inputs.topk_weights):
        kept = poisoned[1].clone()
        poisoned[1] = value
        out = sentinel_moe(*inputs)
        poisoned[1] = kept
        assert torch.equal(out[others], clean[others])
        assert not out[1].isfinite().any()


@pytest.mark.parametrize("T", [2, 16, 40])
def test_nan_in_the_weights_of_an_expert_stays_with_its_tokens(T: int, native_path: str) -> None:
    ids = torch.zeros(T, 1, dtype=torch.int64)
    ids[1] = 1
    inputs = make_inputs(T, 48, 16, [1, 1], 1, torch.bfloat16, ids=ids)
    clean = sentinel_moe(*inputs)
    others = [t for t in range(T) if t != 1]
    for weights in (inputs.w13_blocks, inputs.w2_blocks):
        kept = weights[1].clone()
        weights[1] = float("nan")
        out = sentinel_moe(*inputs)
        weights[1] = kept
        assert torch.equal(out[others], clean[others])
        assert out[1].isnan().all()


@pytest.mark.parametrize("T", [1, 17, 70])
def test_experts_that_cancel_beyond_fp16(T: int, native_path: str) -> None:
    ids = torch.tensor([[0, 1]]).expand(T, 2)
    inputs = make_inputs(T, 16, 16, [1, 1], 2, torch.float16, ids=ids)
    inputs.x.fill_(1.0)
    inputs.w13_blocks.fill_(0.5)
    inputs.topk_weights.fill_(1.0)
    inputs.w2_blocks[0], inputs.w2_blocks[1] = 80.0, -80.0  # ±81,893 each
    assert not sentinel_moe(*inputs).any()


@pytest.mark.parametrize("gate", [-1e30, -200.0, -88.0, -20.0, -1.0, 0.0, 1e-6, 30.0, 88.0, 200.0])
def test_silu_far_from_zero(gate: float, native_path: str) -> None:
    inputs = make_inputs(1, 16, 16, [1], 1, torch.float32)
    inputs.x.fill_(1.0)
    inputs.w13_blocks.zero_()
    inputs.w13_blocks[:, 0, :, 0], inputs.w13_blocks[:, 1, :, 0] = gate, 1.0
    assert relative_error(sentinel_moe(*inputs), in_fp64(inputs)) < TOLERANCE[torch.float32] or gate <= -88.0
    assert sentinel_moe(*inputs).isfinite().all()
    assert gate > -88.0 or float(sentinel_moe(*inputs).abs().max()) < 1e-30


def test_more_tokens_than_are_held_at_once(native_path: str) -> None:
    inputs = make_inputs(4096 + 3, 16, 16, [1, 2, 1], 2, torch.float32)
    assert relative_error(sentinel_moe(*inputs), in_fp64(inputs)) < TOLERANCE[torch.float32]
