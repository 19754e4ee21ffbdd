"""The Triton kernels in Triton's interpreter, against fp64. Run by ../test_sentinel_triton.py.

Products are of a fixed order here (fixed_dot.py), so that row bits are the kernel's own doing on any processor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, Inputs, in_fp64, make_inputs, quantise, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from laguna_serve.kernels.sentinel_moe import gpu, sentinel_moe
from laguna_serve.kernels.sentinel_moe.configs import TABLE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter truncates to bf16 where a GPU rounds to nearest.
TRUNCATED = TOLERANCE | {torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}
# 8-bit weights: H beyond one group of 128 columns, and not a multiple of it.
GROUPS = {"two groups and a rest": (272, 32, [2, 0, 1, 3], 2), "toy": SHAPES["toy"]}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN or a wild number: what is not written shows."""

    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under VLLM_BATCH_INVARIANT=1, which is read once a process."""
    monkeypatch.setattr(gpu, "is_exact", lambda: True)


def assert_right(inputs: Inputs, **kwargs: Any) -> torch.Tensor:
    out = sentinel_moe(*inputs, **kwargs)
    assert out.dtype == inputs.x.dtype
    scales = {name: kwargs[name] for name in ("w13_scales", "w2_scales") if name in kwargs}
    assert relative_error(out, in_fp64(inputs, **scales)) < TRUNCATED[out.dtype]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_right_and_each_row_its_own(shape: str, dtype: torch.dtype) -> None:
    """For nine tokens, one more than fill a tile, and bit by bit the same for one and three of them."""
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(9, H, B, widths, k, dtype)
    whole = assert_right(inputs)
    for rows in (slice(8, 9), slice(4, 7)):
        assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_is_right(shape: str, dtype: torch.dtype) -> None:
    H, B, widths, k = SHAPES[shape]
    assert_right(make_inputs(65, H, B, widths, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["one block each", "toy"])
def test_row_bits_up_to_64_tokens_and_beyond_where_exact(exact: None, shape: str, dtype: torch.dtype) -> None:
    """Among 80 tokens as among 64, 17 and alone: by the listed members as by those that a program finds itself."""
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(80, H, B, widths, k, dtype)
    whole = assert_right(inputs)
    for rows in (slice(0, 64), slice(20, 37), slice(70, 71), slice(7, 72)):
        assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows])


@pytest.mark.parametrize("T", [2, 16, 40, 70])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, T: int) -> None:
    """An expert whose members fill several tiles; one that is named twice."""
    assert_right(make_inputs(T, *ROUTING_SHAPE, 2, torch.float32, ids=ROUTINGS[routing](T)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPS)
def test_8_bit_weights(shape: str, dtype: torch.dtype) -> None:
    H, B, widths, k = GROUPS[shape]
    inputs, scales = quantise(make_inputs(66, H, B, widths, k, dtype))
    if shape != "toy":
        assert_right(inputs, **scales)
    few = inputs.rows(slice(0, 5))
    whole = assert_right(few, **scales)
    for rows in (slice(4, 5), slice(1, 3)):
        assert torch.equal(sentinel_moe(*few.rows(rows), **scales), whole[rows])


def test_every_8_bit_code_is_exact(exact: None) -> None:
    """A token picks one hidden column of one row, times a scale: all 254 numbers, subnormals among them."""
    codes = torch.arange(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    w2 = torch.zeros(1, 16, 256, dtype=torch.uint8)
    w2[0, 0] = codes
    w13 = torch.zeros(1, 2, 16, 256).to(torch.float8_e4m3fn)
    w13[0, :, 0, 0] = 8.0
    x = torch.zeros(1, 256)
    x[0, 0] = 1.0
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[1.0]])
    values = w2.view(torch.float8_e4m3fn)
    scales = {"w13_scales": torch.ones(1, 2, 16, 2), "w2_scales": torch.full((1, 16, 2), 0.5)}
    inputs = Inputs(x, weights, ids, w13, values, torch.tensor([0, 1], dtype=torch.int32))
    act = 64 / (1 + torch.exp(torch.tensor(-8.0)))
    torch.testing.assert_close(sentinel_moe(*inputs, **scales)[0], act * 0.5 * values[0, 0].float())


@pytest.mark.parametrize("T", [3, 40, 70])
def test_no_expert_adds_nothing_and_reads_nothing(T: int) -> None:
    """By −1, as vLLM's padding rows have it, and by any other number that is no expert's."""
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32)
    inputs.topk_ids[1] = -1
    inputs.topk_ids[2, 0] = -1
    inputs.topk_ids[0, 1] = 5
    others = inputs._replace(topk_ids=inputs.topk_ids.clone(), topk_weights=inputs.topk_weights.clone())
    others.topk_ids[others.topk_ids == 5] = -1
    out = sentinel_moe(*inputs)
    assert not out[1].any()
    assert relative_error(out, in_fp64(others)) < TOLERANCE[torch.float32]
    inputs.topk_ids[2, 0], inputs.topk_ids[0, 1] = -(2**31), 2**31 - 1
    assert torch.equal(sentinel_moe(*inputs), out)


def test_a_batch_of_padding_is_zeros() -> None:
    inputs = make_inputs(3, *ROUTING_SHAPE, 2, torch.float32)
    inputs.topk_ids.fill_(-1)
    inputs.w13_blocks.fill_(float("nan"))
    inputs.w2_blocks.fill_(float("nan"))
    assert not sentinel_moe(*inputs).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, at ∞ · 0
@pytest.mark.parametrize("T", [4, 70])
@pytest.mark.parametrize("what", ["x", "topk_weights", "w13_blocks", "w2_blocks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_keeps_its_nan_to_itself(what: str, T: int, value: float) -> None:
    """Of a token, or of the expert that it alone chose."""
    ids = torch.zeros(T, 1, dtype=torch.long)
    ids[1] = 1
    inputs = make_inputs(T, 48, 16, [1, 1], 1, torch.float32, ids=ids)
    clean = sentinel_moe(*inputs)
    getattr(inputs, what)[1] = value
    out = sentinel_moe(*inputs)
    others = [t for t in range(T) if t != 1]
    assert torch.equal(out[others], clean[others])
    assert not out[1].isfinite().all()


@pytest.mark.parametrize("T", [1, 17, 65])
def test_experts_that_cancel_beyond_fp16(T: int) -> None:
    """±81,893 are no fp16 numbers; their sum is."""
    inputs = make_inputs(T, 16, 16, [1, 1], 2, torch.float16, ids=torch.tensor([[0, 1]]).expand(T, 2))
    for name, value in (("x", 1.0), ("w13_blocks", 0.5), ("topk_weights", 1.0)):
        getattr(inputs, name).fill_(value)
    inputs.w2_blocks[0], inputs.w2_blocks[1] = 80.0, -80.0
    assert torch.equal(sentinel_moe(*inputs), torch.zeros(T, 16, dtype=torch.float16))
    quantised, scales = quantise(inputs)
    assert torch.equal(sentinel_moe(*quantised, **scales), torch.zeros(T, 16, dtype=torch.float16))


@pytest.mark.parametrize("T", [1, 65])
def test_bound_above_the_widest_expert(T: int) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32)
    assert torch.equal(assert_right(inputs, max_blocks_per_expert=7), assert_right(inputs))


@pytest.mark.parametrize("start", [[0, 2, 3, 6, 7, 12], [-1, 2, 3, 6, 7, 11], [0, 2, 1, 6, 7, 11]])
def test_block_start_beyond_the_weights_is_refused(start: list[int]) -> None:
    inputs = make_inputs(2, *ROUTING_SHAPE, 2, torch.float32)
    with pytest.raises(IndexError, match=r"^block_start: expected ascending numbers up to 11, got \[.*; check the che"):
        sentinel_moe(*inputs._replace(block_start=torch.tensor(start, dtype=torch.int32)), max_blocks_per_expert=4)


def test_bound_below_the_widest_expert_is_refused() -> None:
    inputs = make_inputs(2, *ROUTING_SHAPE, 2, torch.float32)
    with pytest.raises(IndexError, match=r"^block_start: expected at most 3 blocks for an expert.*, got 4; pass"):
        sentinel_moe(*inputs, max_blocks_per_expert=3)


def test_block_start_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, *ROUTING_SHAPE, 2, torch.float32)
    sentinel_moe(*inputs, max_blocks_per_expert=4)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read again"))
    sentinel_moe(*inputs, max_blocks_per_expert=4)
    inputs.block_start[-1] = 11
    with pytest.raises(pytest.fail.Exception, match="read again"):
        sentinel_moe(*inputs, max_blocks_per_expert=4)


@pytest.mark.parametrize("T", [2, 70])
def test_kernels_hold_block_start_to_the_weights(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was not looked at, as in a graph that is captured first: no read beyond, the rest as it should be."""
    monkeypatch.setattr(gpu, "check_block_start", lambda start, n, most: None)
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32, ids=torch.tensor([0, 4]).expand(T, 2))
    right = sentinel_moe(*inputs, max_blocks_per_expert=4)
    for entry, value in ((-1, 2**26), (0, -(2**26))):
        wild = inputs.block_start.clone()
        wild[entry] = value
        assert torch.equal(sentinel_moe(*inputs._replace(block_start=wild), max_blocks_per_expert=4), right)


def test_empty_batch() -> None:
    assert sentinel_moe(*make_inputs(0, *ROUTING_SHAPE, 2, torch.float32)).shape == (0, 48)


@pytest.mark.parametrize("T", [3, 70])
def test_scratch_is_cut_by_columns_then_by_tokens(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(T, 320, 16, [2, 1, 3], 2, torch.float16)
    whole = assert_right(inputs)
    assert torch.equal(sentinel_moe(*inputs), whole)
    windows: list[tuple[int, int]] = []
    run_down = gpu.run_down
    monkeypatch.setattr(gpu, "run_down", lambda *args: (windows.append(args[6]), run_down(*args)))
    monkeypatch.setattr(gpu, "PAIR_OUT_BYTES", 1)
    monkeypatch.setattr(gpu, "ACT_BYTES", 1)
    assert torch.equal(sentinel_moe(*inputs), whole)
    step = TABLE["decode" if T <= 64 else "prefill", "16-bit"].block_n
    one_pass = [(first, min(step, 320 - first)) for first in range(0, 320, step)]
    again = [(first, 64) for first in range(0, 320, 64)] if T > 64 else []  # the last six tokens
    assert windows == one_pass + ([(first, min(128, 320 - first)) for first in range(0, 320, 128)] if again else [])


@pytest.mark.parametrize("experts", [1, 5, 40])
@pytest.mark.parametrize("tokens", [65, 200])
def test_every_pair_is_listed_once(tokens: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LISTED_AT_ONCE", 128)
    torch.manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, 2), dtype=torch.int32)
    members, owners = gpu.list_members(ids, experts, 8)
    seen = []
    for tile, owner in zip(members.tolist(), owners.tolist(), strict=True):
        if owner < 0:
            continue
        pairs = [pair for pair in tile if pair >= 0]
        assert pairs, "a tile without pairs is work for nothing"
        assert pairs == sorted(pairs)
        assert (ids.flatten()[pairs] == owner).all()
        seen += pairs
    there = (ids.flatten() >= 0) & (ids.flatten() < experts)
    assert sorted(seen) == there.nonzero().flatten().tolist()
    assert owners[owners >= 0].tolist() == sorted(owners[owners >= 0].tolist())


@pytest.mark.parametrize(("T", "launches"), [(1, 3), (64, 3), (65, 4)])
@pytest.mark.parametrize("scaled", [False, True], ids=["wide", "8-bit"])
def test_launches_of_a_layer(T: int, launches: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels, and no operator of torch's beside them but those that allocate."""
    inputs, scales = make_inputs(T, 48, 16, [1] * 6, 3, torch.bfloat16), {}
    if scaled:
        inputs, scales = quantise(inputs)
    launched: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: launched.append(self.__name__))
    with OperatorNames() as operators:
        sentinel_moe(*inputs, **scales, max_blocks_per_expert=1)
    assert launched == ["group", "gate_up", "down", "combine"][4 - launches :]
    assert operators.names - {"sentinel_moe", "empty", "empty_like", "new_empty", "fill_", "slice", "view"} == set()


class OperatorNames(TorchDispatchMode):
    """The operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradient_is_refused_and_fakes_have_the_outputs_shape() -> None:
    inputs = make_inputs(3, *ROUTING_SHAPE, 2, torch.float32)
    on_meta = sentinel_moe(*(tensor.to("meta") for tensor in inputs), max_blocks_per_expert=4)
    assert (on_meta.shape, on_meta.dtype) == (inputs.x.shape, inputs.x.dtype)
    inputs.x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^sentinel_moe: expected inputs without gradients"):
        sentinel_moe(*inputs)
