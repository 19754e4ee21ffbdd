"""The Triton kernels in Triton's interpreter, against the reference.  Run by ../test_sentinel_triton.py.

Products are of a fixed order here (fixed_dot.py), so that row bits are the kernel's own doing on any processor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, Inputs, make_inputs, relative_error

from laguna_serve.kernels.sentinel_moe import gpu, sentinel_moe, sentinel_moe_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter truncates to bf16 where a GPU rounds to nearest.
TRUNCATED = TOLERANCE | {torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN or a wild number: what is not written shows."""

    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which path each call took."""
    taken: list[str] = []

    def spy_on(name: str) -> None:
        run = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args: (taken.append(name), run(*args)))

    spy_on("run_decode")
    spy_on("run_prefill")
    return taken


def assert_right(inputs: Inputs, **kwargs: Any) -> torch.Tensor:
    out = sentinel_moe(*inputs, **kwargs)
    assert out.dtype == inputs.x.dtype
    assert relative_error(out, sentinel_moe_reference(*inputs)) < TRUNCATED[out.dtype]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3, 16, 17, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_the_reference(shape: str, T: int, dtype: torch.dtype, paths: list[str]) -> None:
    H, B, widths, k = SHAPES[shape]
    assert_right(make_inputs(T, H, B, widths, k, dtype))
    assert paths == ["run_decode" if T <= 16 else "run_prefill"]


@pytest.mark.parametrize("T", [2, 16, 40])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, T: int) -> None:
    assert_right(make_inputs(T, *ROUTING_SHAPE, 2, torch.float32, ids=ROUTINGS[routing](T)))


@pytest.mark.parametrize("T", [1, 17])
def test_bound_above_the_widest_expert(T: int) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32)
    assert torch.equal(assert_right(inputs, max_blocks_per_expert=7), assert_right(inputs))


def test_empty_batch() -> None:
    assert sentinel_moe(*make_inputs(0, *ROUTING_SHAPE, 2, torch.float32)).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "block 64", "16 experts per token"])
def test_a_rows_bits_do_not_depend_on_its_batch(shape: str, dtype: torch.dtype) -> None:
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(16, H, B, widths, k, dtype)
    whole = sentinel_moe(*inputs)
    assert torch.equal(sentinel_moe(*inputs), whole)
    for rows in (*(slice(i, i + 1) for i in range(0, 16, 3)), slice(2, 9), slice(0, 15)):
        assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows])


def test_prefill_is_deterministic_and_cut_to_fit_its_scratch(monkeypatch: pytest.MonkeyPatch, paths: list[str]) -> None:
    inputs = make_inputs(70, *ROUTING_SHAPE, 2, torch.float32)
    whole = assert_right(inputs)
    assert torch.equal(sentinel_moe(*inputs), whole)
    monkeypatch.setattr(gpu, "PREFILL_SCRATCH_BYTES", 1)
    assert torch.equal(assert_right(inputs), whole)
    assert paths == ["run_prefill"] * 2 + ["run_prefill"] * 5


@pytest.mark.parametrize("experts", [1, 5, 40])
@pytest.mark.parametrize("pairs", [1, 64, 200])
def test_tiles_cover_every_pair_once(pairs: int, experts: int) -> None:
    torch.manual_seed(pairs)
    ids = torch.randint(experts, (pairs, 1), dtype=torch.int32)
    order, tile_expert, tile_first, pair_end, num_tiles = gpu.sort_pairs(ids, experts, 32)
    seen = []
    for tile in range(int(num_tiles)):
        expert = int(tile_expert[tile])
        places = range(int(tile_first[tile]), min(int(tile_first[tile]) + 32, int(pair_end[expert])))
        assert places, "a tile without pairs is work for nothing"
        assert (ids.flatten()[order[list(places)]] == expert).all()
        seen += order[list(places)].tolist()
    assert sorted(seen) == list(range(pairs))
