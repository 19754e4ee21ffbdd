"""The op on a CUDA device: bf16, CUDA graphs, streams, and the row invariance that speculative decoding rests on."""

from __future__ import annotations

import pytest
import torch
from moe_cases import ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, Inputs, make_inputs, relative_error

from laguna_serve.kernels.sentinel_moe import sentinel_moe, sentinel_moe_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYER = (2048, 64, [8, 7, 1, 8, 5, 8, 2, 6] * 8, 8)


def on_gpu(T: int, shape: tuple[int, int, list[int], int], dtype: torch.dtype, seed: int = 0) -> Inputs:
    H, B, widths, k = shape
    return make_inputs(T, H, B, widths, k, dtype, seed=seed, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 8, 16, 17, 33, 64, 1000])
@pytest.mark.parametrize("shape", [*SHAPES, "layer"])
def test_kernels_compute_the_reference(shape: str, T: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(T, SHAPES.get(shape, LAYER), dtype)
    assert relative_error(sentinel_moe(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("T", [2, 16, 40])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, T: int) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.bfloat16, ids=ROUTINGS[routing](T), device="cuda")
    assert relative_error(sentinel_moe(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "layer"])
def test_a_rows_bits_do_not_depend_on_its_batch(shape: str, dtype: torch.dtype) -> None:
    inputs = on_gpu(16, SHAPES.get(shape, LAYER), dtype)
    whole = sentinel_moe(*inputs)
    for rows in (*(slice(i, i + 1) for i in range(16)), slice(2, 9), slice(0, 8), slice(1, 16)):
        assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows])


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
