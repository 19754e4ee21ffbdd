"""The op on a CUDA device: bf16, CUDA graphs, streams, and the row invariance that speculative decoding rests on."""

from __future__ import annotations

import pytest
import torch
from moe_cases import ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, Inputs, in_fp64, make_inputs, quantise, relative_error

from laguna_serve.kernels.sentinel_moe import sentinel_moe, sentinel_moe_reference

gpu = pytest.importorskip("laguna_serve.kernels.sentinel_moe.gpu")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYER = (2048, 64, [8, 7, 1, 8, 5, 8, 2, 6] * 8, 8)


def on_gpu(T: int, shape: tuple[int, int, list[int], int], dtype: torch.dtype, seed: int = 0) -> Inputs:
    H, B, widths, k = shape
    return make_inputs(T, H, B, widths, k, dtype, seed=seed, device="cuda")


def to_gpu(inputs: Inputs, scales: dict[str, torch.Tensor]) -> tuple[Inputs, dict[str, torch.Tensor]]:
    return Inputs(*(tensor.cuda() for tensor in inputs)), {name: tensor.cuda() for name, tensor in scales.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 8, 16, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize("shape", [*SHAPES, "layer"])
def test_kernels_compute_the_reference(shape: str, T: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(T, SHAPES.get(shape, LAYER), dtype)
    assert relative_error(sentinel_moe(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("T", [2, 16, 40])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, T: int) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.bfloat16, ids=ROUTINGS[routing](T), device="cuda")
    assert relative_error(sentinel_moe(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("scaled", [False, True], ids=["wide", "8-bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "layer"])
def test_a_rows_bits_do_not_depend_on_its_batch(
    shape: str, dtype: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 64 tokens, and among 300 where bits are asked for."""
    monkeypatch.setattr(gpu, "is_exact", lambda: True)
    inputs, scales = make_inputs(300, *SHAPES.get(shape, LAYER), dtype), {}
    if scaled:
        inputs, scales = quantise(inputs)
    inputs, scales = to_gpu(inputs, scales)
    whole = sentinel_moe(*inputs, **scales)
    singles = (slice(i, i + 1) for i in range(0, 64, 3))
    for rows in (*singles, slice(2, 9), slice(0, 8), slice(1, 17), slice(0, 64), slice(40, 104), slice(0, 65)):
        assert torch.equal(sentinel_moe(*inputs.rows(rows), **scales), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 9, 64, 65, 300])
@pytest.mark.parametrize("shape", ["toy", "layer"])
def test_8_bit_weights(shape: str, T: int, dtype: torch.dtype) -> None:
    inputs, scales = quantise(make_inputs(T, *SHAPES.get(shape, LAYER), dtype))
    right = in_fp64(inputs, **scales)
    inputs, scales = to_gpu(inputs, scales)
    assert relative_error(sentinel_moe(*inputs, **scales).cpu(), right) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_8_bit_code_is_exact(dtype: torch.dtype) -> None:
    """All 254 numbers by the kernels' own decoding, as rows of gate and up and as rows of down."""
    codes = torch.arange(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    numbers = codes.view(torch.float8_e4m3fn)
    zero = torch.zeros(1, dtype=torch.float8_e4m3fn)
    x = torch.zeros(1, 256)
    x[0, 0] = 1.0
    w13, w2 = zero.expand(1, 2, 16, 256).contiguous(), zero.expand(1, 16, 256).contiguous()
    w13[0, :, 0, 0] = torch.tensor(8.0).to(torch.float8_e4m3fn)
    w2[0, 0] = numbers
    scales = {"w13_scales": torch.ones(1, 2, 16, 2), "w2_scales": torch.ones(1, 16, 2)}
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    inputs = Inputs(x.to(dtype), weights, ids, w13, w2, torch.tensor([0, 1], dtype=torch.int32))
    right = in_fp64(inputs, **scales)
    inputs, scales = to_gpu(inputs, scales)
    out = sentinel_moe(*inputs, **scales).cpu().double()
    torch.testing.assert_close(out, right, rtol=2 ** (-7 if dtype == torch.bfloat16 else -10), atol=0)


@pytest.mark.parametrize("T", [4, 70])
def test_padding_and_nan_stay_with_their_rows(T: int) -> None:
    ids = torch.zeros(T, 2, dtype=torch.long)
    ids[1], ids[2] = 1, -1
    inputs = make_inputs(T, 48, 16, [1, 1], 2, torch.bfloat16, ids=ids, device="cuda")
    clean = sentinel_moe(*inputs)
    inputs.w2_blocks[1] = float("nan")
    out = sentinel_moe(*inputs)
    others = [t for t in range(T) if t != 1]
    assert torch.equal(out[others], clean[others])
    assert not out[2].any()
    assert out[1].isnan().all()


@pytest.mark.parametrize("T", [1, 8, 16, 64, 1000])
def test_same_call_same_bits(T: int) -> None:
    inputs = on_gpu(T, LAYER, torch.bfloat16)
    first = sentinel_moe(*inputs)
    for _ in range(50):
        assert torch.equal(sentinel_moe(*inputs), first)


@pytest.mark.parametrize("T", [1, 8, 64])
def test_cuda_graph_replays_with_new_inputs(T: int) -> None:
    static, other = on_gpu(T, LAYER, torch.bfloat16), on_gpu(T, LAYER, torch.bfloat16, seed=1)
    sentinel_moe(*static, max_blocks_per_expert=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sentinel_moe(*static, max_blocks_per_expert=8)
    for mine, theirs in zip(static, other, strict=True):
        mine.copy_(theirs)
    expected = sentinel_moe(*static, max_blocks_per_expert=8)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_capture_without_a_bound_is_refused() -> None:
    inputs = on_gpu(1, LAYER, torch.bfloat16)
    with (
        pytest.raises(RuntimeError, match=r"^max_blocks_per_expert: expected a number in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        sentinel_moe(*inputs)


def test_streams_do_not_disturb_each_other() -> None:
    batches = [on_gpu(8, LAYER, torch.bfloat16, seed=seed) for seed in range(4)]
    expected = [sentinel_moe(*batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results: list[list[torch.Tensor]] = [[] for _ in batches]
    for _ in range(20):
        for stream, batch, outs in zip(streams, batches, results, strict=True):
            with torch.cuda.stream(stream):
                outs.append(sentinel_moe(*batch, max_blocks_per_expert=8))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)


def test_device_mismatch_is_named() -> None:
    inputs = on_gpu(1, LAYER, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^topk_ids: expected device cuda"):
        sentinel_moe(*inputs._replace(topk_ids=inputs.topk_ids.cpu()))
