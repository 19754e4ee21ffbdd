"""The public op on a CPU: its arguments, its best path, plain torch where there is no compiler, compiled graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_cases import DTYPES, ROUTING_SHAPE, ROUTINGS, SHAPES, TOLERANCE, Inputs, make_inputs, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from laguna_serve.kernels.sentinel_moe import cpu, sentinel_moe, sentinel_moe_reference


def one_expert_at_a_time(inputs: Inputs) -> torch.Tensor:
    """The definition once more, token by token in fp64, to hold the reference itself to."""
    x, weights, ids, w13, w2, start = inputs
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            for block in range(int(start[ids[t, j]]), int(start[ids[t, j] + 1])):
                gate, up = (w13[block, part].double() @ x[t].double() for part in (0, 1))
                out[t] += weights[t, j].double() * (gate * gate.sigmoid() * up) @ w2[block].double()
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: str) -> None:
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(5, H, B, widths, k, torch.float32)
    assert relative_error(sentinel_moe_reference(*inputs), one_expert_at_a_time(inputs)) < 1e-6


def test_cpu_kernels_are_built() -> None:
    assert cpu.load() is not None, "install g++: these tests would try the plain-torch path only"


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 2, 7, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_op_computes_the_reference(shape: str, T: int, dtype: torch.dtype, run: Callable[..., torch.Tensor]) -> None:
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(T, H, B, widths, k, dtype)
    out = run(*inputs)
    assert out.dtype == dtype
    assert out.shape == (T, H)
    assert relative_error(out, sentinel_moe_reference(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str, run: Callable[..., torch.Tensor]) -> None:
    inputs = make_inputs(20, *ROUTING_SHAPE, 2, torch.float32, ids=ROUTINGS[routing](20))
    assert relative_error(run(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[torch.float32]


def test_more_tokens_than_are_held_at_once() -> None:
    inputs = make_inputs(4096 + 3, 16, 16, [1, 2, 1], 2, torch.float32)
    assert relative_error(sentinel_moe(*inputs), sentinel_moe_reference(*inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["toy", "block 48", "16 experts per token"])
def test_a_rows_bits_depend_on_neither_batch_nor_threads(shape: str, dtype: torch.dtype) -> None:
    H, B, widths, k = SHAPES[shape]
    inputs = make_inputs(40, H, B, widths, k, dtype)
    whole = sentinel_moe(*inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(3, 4), slice(2, 9), slice(0, 16), slice(7, 40)):
                assert torch.equal(sentinel_moe(*inputs.rows(rows)), whole[rows])
    finally:
        torch.set_num_threads(threads)


def test_pruned_blocks_are_not_read() -> None:
    """What no chosen expert owns may be anything."""
    inputs = make_inputs(4, *ROUTING_SHAPE, 2, torch.float32, ids=torch.tensor([1, 3]).expand(4, 2))
    whole = sentinel_moe(*inputs)
    owned = torch.zeros(len(inputs.w2_blocks), dtype=torch.bool)
    for expert in (1, 3):
        owned[inputs.block_start[expert] : inputs.block_start[expert + 1]] = True
    inputs.w13_blocks[~owned] = float("nan")
    inputs.w2_blocks[~owned] = float("nan")
    assert torch.equal(sentinel_moe(*inputs), whole)


def good() -> Inputs:
    return make_inputs(3, *ROUTING_SHAPE, 2, torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("x", lambda x: x.double(), TypeError),
        ("x", lambda x: x[0], ValueError),
        ("x", lambda x: x[:, :40].contiguous(), ValueError),
        ("x", lambda x: x.t().contiguous().t(), ValueError),
        ("topk_weights", lambda w: w.half(), TypeError),
        ("topk_weights", lambda w: w[:2].contiguous(), ValueError),
        ("topk_weights", lambda w: w.t().contiguous().t(), ValueError),
        ("topk_ids", lambda ids: ids.long(), TypeError),
        ("topk_ids", lambda ids: ids.repeat(1, 9), ValueError),
        ("topk_ids", lambda ids: ids[:, :0], ValueError),
        ("w13_blocks", lambda w: w.bfloat16(), TypeError),
        ("w13_blocks", lambda w: w[1:].contiguous(), ValueError),
        ("w13_blocks", lambda w: w[:, :1].contiguous(), ValueError),
        ("w13_blocks", lambda w: w.transpose(1, 2).contiguous().transpose(1, 2), ValueError),
        ("w2_blocks", lambda w: w[..., :32].contiguous(), ValueError),
        ("w2_blocks", lambda w: w[:, :8].contiguous(), ValueError),
        ("w2_blocks", lambda w: w.flatten(0, 1), ValueError),
        ("block_start", lambda start: start.long(), TypeError),
        ("block_start", lambda start: start[:1], ValueError),
        ("block_start", lambda start: start.repeat_interleave(2)[::2], ValueError),
    ],
)
def test_bad_argument_is_named(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], error: type[Exception]
) -> None:
    inputs = good()
    bad = inputs._replace(**{name: change(getattr(inputs, name))})
    with pytest.raises(error, match=rf"^{name}: expected .* got .*; "):
        sentinel_moe(*bad)


def test_bound_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_blocks_per_expert: expected at least 1, got 0"):
        sentinel_moe(*good(), max_blocks_per_expert=0)


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("expert", [-2, 5, 2**31 - 1])
def test_unknown_expert_is_refused_on_a_cpu(expert: int, run: Callable[..., torch.Tensor]) -> None:
    inputs = good()
    inputs.topk_ids[1, 0] = expert
    with pytest.raises(
        IndexError,
        match=rf"^topk_ids: expected expert ids from 0 to 4, or -1 for none, got {expert}; check the router$",
    ):
        run(*inputs)


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("T", [3, 40])
def test_no_expert_adds_nothing(T: int, run: Callable[..., torch.Tensor]) -> None:
    inputs = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32)
    inputs.topk_ids[1] = -1
    inputs.topk_ids[2, 0] = -1
    others = [t for t in range(T) if t not in (1, 2)]
    out = run(*inputs)
    assert not out[1].any()
    only = inputs._replace(
        topk_ids=inputs.topk_ids[:, 1:].contiguous(), topk_weights=inputs.topk_weights[:, 1:].contiguous()
    )
    torch.testing.assert_close(out[2], run(*only)[2])
    whole = make_inputs(T, *ROUTING_SHAPE, 2, torch.float32)
    torch.testing.assert_close(out[others], run(*whole)[others])


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch], ids=["kernel", "plain torch"])
@pytest.mark.parametrize(
    "start", [[0, 2, 3, 6, 7, 2**26], [0, 2, 3, 6, 7, 12], [0, 2, 1, 6, 7, 11], [-1, 2, 3, 6, 7, 11]]
)
def test_blocks_beyond_the_weights_are_not_read(start: list[int], run: Callable[..., torch.Tensor]) -> None:
    ids = torch.tensor([[0, 1], [1, 4], [2, 3]])
    inputs = make_inputs(3, *ROUTING_SHAPE, 2, torch.float32, ids=ids)
    with pytest.raises(IndexError, match=r"^block_start: expected ascending numbers up to 11, got .*; check the check"):
        run(*inputs._replace(block_start=torch.tensor(start, dtype=torch.int32)))


def test_gradient_is_refused() -> None:
    inputs = good()
    inputs.x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^sentinel_moe: expected inputs without gradients"):
        sentinel_moe(*inputs)
    with torch.no_grad():
        assert not sentinel_moe(*inputs).requires_grad


def test_fake_tensors_have_the_outputs_shape() -> None:
    with FakeTensorMode() as mode:
        fakes = Inputs(*(mode.from_tensor(tensor) for tensor in good()))
        out = sentinel_moe(*fakes, max_blocks_per_expert=4)
    assert out.shape == fakes.x.shape
    assert out.dtype == fakes.x.dtype
    on_meta = sentinel_moe(*(tensor.to("meta") for tensor in good()), max_blocks_per_expert=4)
    assert on_meta.shape == fakes.x.shape


@pytest.mark.slow
def test_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.laguna_serve.sentinel_moe.default, (*good(), None, None, 4))


def test_compiled_graph_keeps_the_op_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return sentinel_moe(x + 1, *inputs[1:], max_blocks_per_expert=4) * 2

    inputs = good()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.equal(compiled(inputs.x, inputs), layer(inputs.x, inputs))
    calls = [node for graph in graphs for node in graph.graph.nodes if "sentinel_moe" in str(node.target)]
    assert len(calls) == 1
