"""8-bit weights on every path of the CPU library that runs here: all codes, row bits, NaN, scales, odd widths."""

from __future__ import annotations

import pytest
import torch
from moe_cases import DTYPES, ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, in_fp64, make_inputs, quantise, relative_error

from laguna_serve.kernels.sentinel_moe import sentinel_moe

# Rests of 16, 32, 48, 64 and 112 columns behind whole groups of 128; blocks of 16 to 256 atoms.
WIDE = {
    "rest of 16": (2064, 64, [2, 1, 2], 2),
    "rest of 32": (160, 48, [2, 1, 3], 2),
    "rest of 48": (304, 32, [2, 1, 3], 2),
    "rest of 64": (192, 16, [2, 1, 3], 2),
    "rest of 112": (240, 112, [2, 1, 0], 2),
    "block 256": (272, 256, [1, 2], 2),
}
NAN_CODES = (0x7F, 0xFF)
CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE])
def test_path_computes_the_definition(shape: str, dtype: torch.dtype, native_path: str) -> None:
    H, B, widths, k = (SHAPES | WIDE)[shape]
    for T in (0, 1, 3, 7, 17, 70):
        inputs, scales = quantise(make_inputs(T, H, B, widths, k, dtype))
        out = sentinel_moe(*inputs, **scales)
        assert out.dtype == dtype
        assert relative_error(out, in_fp64(inputs, **scales)) < TOLERANCE[dtype], T


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "16 experts per token", "rest of 16", "rest of 48"])
def test_a_rows_bits_depend_on_neither_batch_nor_threads(shape: str, dtype: torch.dtype, native_path: str) -> None:
    H, B, widths, k = (SHAPES | WIDE)[shape]
    inputs, scales = quantise(make_inputs(300, H, B, widths, k, dtype))
    whole = sentinel_moe(*inputs, **scales)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first, last in ((0, 1), (3, 4), (299, 300), (2, 9), (0, 17), (7, 64), (0, 257)):
                rows = slice(first, last)
                assert torch.equal(sentinel_moe(*inputs.rows(rows), **scales), whole[rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


def make_codes() -> torch.Tensor:
    """[16, 256] codes, each once in a row, and each within any sixteen columns."""
    return (CODES + 16 * torch.arange(16, dtype=torch.uint8)[:, None]).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [4, 256])
def test_every_code_of_gate_and_up(T: int, dtype: torch.dtype, native_path: str) -> None:
    """A token takes one column, which gate turns to 1 and up to the code's value, 2^-9 to 448."""
    codes = make_codes()
    clean = codes.view(torch.uint8).masked_fill(codes.float().isnan(), 0).view(torch.float8_e4m3fn)
    one = torch.ones(16, 256).to(torch.float8_e4m3fn)
    w13 = torch.stack([one, clean])[None].contiguous()
    down = torch.eye(16, 256).to(torch.float8_e4m3fn)[None]  # out[t, a] is the activation of atom a
    scales = {"w13_scales": torch.ones(1, 2, 16, 2), "w2_scales": torch.ones(1, 16, 2)}
    routing = torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.int32)
    start = torch.tensor([0, 1], dtype=torch.int32)
    for first in range(0, 16 if T == 4 else 256, T):
        x = torch.eye(256)[first : first + T].to(dtype)
        out = sentinel_moe(x, *routing, w13, down, start, **scales)
        expected = torch.nn.functional.silu(torch.ones(())) * clean.float().t()[first : first + T]
        torch.testing.assert_close(out[:, :16].float(), expected, rtol=8e-3, atol=0)
    for part in range(2):  # against any x, even zero, a row with a NaN is NaN
        bad = w13.clone()
        bad[0, part, 5, 77] = float("nan")
        x = torch.zeros(T, 256, dtype=dtype)
        assert sentinel_moe(x, *routing, bad, one[None].contiguous(), start, **scales).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 7])
def test_every_code_of_down(T: int, dtype: torch.dtype, native_path: str) -> None:
    """An atom at a time is active: its row of w2 comes out, and NaN where any atom's code is NaN."""
    codes = make_codes()
    scales = {"w13_scales": torch.ones(1, 2, 16, 2), "w2_scales": torch.ones(1, 16, 2)}
    is_nan = codes.float().isnan().any(0)
    one_act = float(torch.nn.functional.silu(torch.ones(())).to(dtype))
    x = torch.zeros(T, 256, dtype=dtype)
    x[:, 0] = 1.0
    for atom in range(16):
        w13 = torch.zeros(1, 2, 16, 256)
        w13[0, :, atom, 0] = 1.0
        rest = torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.int32), w13.to(torch.float8_e4m3fn), codes[None]
        out = sentinel_moe(x, *rest, torch.tensor([0, 1], dtype=torch.int32), **scales)
        assert torch.equal(out.isnan(), is_nan.expand(T, 256))
        values = codes[atom].float() * one_act
        torch.testing.assert_close(out[:, ~is_nan].float(), values[~is_nan].expand(T, -1), rtol=8e-3, atol=0)


def test_subnormals_are_not_lost(native_path: str) -> None:
    """Weights of 2^-9 alone, which bf16's instructions would flush if they were subnormal there."""
    for T in (1, 17):
        inputs, scales = quantise(make_inputs(T, 256, 16, [2, 1], 2, torch.bfloat16))
        small = torch.full_like(inputs.w13_blocks.float(), 2.0**-9).to(torch.float8_e4m3fn)
        tiny = inputs._replace(w13_blocks=small, w2_blocks=small[:, 0].contiguous())
        wide = {name: torch.full_like(scale, 4.0) for name, scale in scales.items()}
        out = sentinel_moe(*tiny, **wide)
        assert out.any()
        assert relative_error(out, in_fp64(tiny, **wide)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_and_group_has_its_own_scale(dtype: torch.dtype, native_path: str) -> None:
    """Scales over many powers of two, small ones too: in fp16 activations are not scaled before they are rounded."""
    for T in (2, 40):
        inputs, scales = quantise(make_inputs(T, 272, 32, [2, 1, 3], 2, dtype))
        generator = torch.Generator().manual_seed(1)
        spread = {
            name: scale * torch.exp2(torch.randint(-6, 3, scale.shape, generator=generator).float()) * 2.0**-6
            for name, scale in scales.items()
        }
        spread["w13_scales"] *= 64
        out = sentinel_moe(*inputs, **spread)
        assert relative_error(out.double(), in_fp64(inputs, **spread)) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, native_path: str) -> None:
    for T in (1, 20):
        inputs, scales = quantise(make_inputs(T, *ROUTING_SHAPE, 2, torch.float32, ids=ROUTINGS[routing](T)))
        assert relative_error(sentinel_moe(*inputs, **scales), in_fp64(inputs, **scales)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [4, 40])
def test_nan_stays_with_its_token_or_expert(T: int, dtype: torch.dtype, native_path: str) -> None:
    inputs, scales = quantise(make_inputs(T, *ROUTING_SHAPE, 2, dtype))
    clean = sentinel_moe(*inputs, **scales)
    others = [t for t in range(T) if t != 1]
    inputs.x[1] = float("nan")
    out = sentinel_moe(*inputs, **scales)
    assert torch.equal(out[others], clean[others])
    assert out[1].isnan().all()

    ids = torch.zeros(T, 1, dtype=torch.int64)
    ids[1] = 1
    inputs, scales = quantise(make_inputs(T, 48, 16, [1, 1], 1, dtype, ids=ids))
    clean = sentinel_moe(*inputs, **scales)
    for code in NAN_CODES:
        for weights in (inputs.w13_blocks, inputs.w2_blocks):
            raw = weights.view(torch.uint8)
            kept = raw[1].clone()
            raw[1] = code
            out = sentinel_moe(*inputs, **scales)
            raw[1] = kept
            assert torch.equal(out[others], clean[others])
            assert out[1].isnan().all()


@pytest.mark.parametrize("T", [1, 17, 70])
def test_experts_that_cancel_beyond_fp16(T: int, native_path: str) -> None:
    ids = torch.tensor([[0, 1]]).expand(T, 2)
    inputs = make_inputs(T, 16, 16, [1, 1], 2, torch.float16, ids=ids)
    inputs.x.fill_(1.0)
    inputs.w13_blocks.fill_(0.5)
    inputs.topk_weights.fill_(1.0)
    inputs.w2_blocks[0], inputs.w2_blocks[1] = 80.0, -80.0
    narrow, scales = quantise(inputs)
    assert not sentinel_moe(*narrow, **scales).any()


def test_no_expert_adds_nothing(native_path: str) -> None:
    for T in (3, 40):
        inputs, scales = quantise(make_inputs(T, *ROUTING_SHAPE, 2, torch.float32))
        inputs.topk_ids[1] = -1
        out = sentinel_moe(*inputs, **scales)
        assert not out[1].any()
        assert relative_error(out, in_fp64(inputs, **scales)) < TOLERANCE[torch.float32]


def test_more_tokens_than_are_held_at_once(native_path: str) -> None:
    inputs, scales = quantise(make_inputs(4096 + 3, 16, 16, [1, 2, 1], 2, torch.float32))
    assert relative_error(sentinel_moe(*inputs, **scales), in_fp64(inputs, **scales)) < TOLERANCE[torch.float32]


def test_blocks_beyond_the_weights_are_not_read(native_path: str) -> None:
    inputs, scales = quantise(make_inputs(3, *ROUTING_SHAPE, 2, torch.float32))
    start = torch.tensor([0, 2, 3, 6, 7, 2**26], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"^block_start: expected ascending numbers up to 11, got 67108864; check"):
        sentinel_moe(*inputs._replace(block_start=start, topk_ids=torch.full_like(inputs.topk_ids, 4)), **scales)
