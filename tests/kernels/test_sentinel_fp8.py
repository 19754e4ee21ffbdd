"""8-bit weights: the public op, the reference and plain torch against fp64; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_cases import DTYPES, ROUTING_SHAPE, SHAPES, TOLERANCE, in_fp64, make_inputs, quantise, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from laguna_serve.kernels.sentinel_moe import cpu, sentinel_moe, sentinel_moe_reference

# H beyond one group of 128 columns, and not a multiple of it.
GROUPS = {"two groups and a rest": (272, 32, [2, 0, 1, 3], 2), "four groups": (512, 64, [2, 1], 2)}


@pytest.mark.parametrize("run", [sentinel_moe, cpu.run_torch, sentinel_moe_reference], ids=["op", "torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *GROUPS])
def test_op_computes_the_definition(shape: str, dtype: torch.dtype, run: Callable[..., torch.Tensor]) -> None:
    H, B, widths, k = (SHAPES | GROUPS)[shape]
    for T in (0, 1, 7, 33):
        inputs, scales = quantise(make_inputs(T, H, B, widths, k, dtype))
        out = run(*inputs, **scales)
        assert out.dtype == dtype
        assert out.shape == (T, H)
        assert relative_error(out, in_fp64(inputs, **scales)) < TOLERANCE[dtype], T


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("w13_scales", lambda s: None, ValueError),
        ("w2_scales", lambda s: None, ValueError),
        ("w13_scales", lambda s: s.half(), TypeError),
        ("w13_scales", lambda s: s[..., :1].contiguous(), ValueError),
        ("w13_scales", lambda s: s[:, 0].contiguous(), ValueError),
        ("w2_scales", lambda s: s.double(), TypeError),
        ("w2_scales", lambda s: s[1:].contiguous(), ValueError),
        ("w2_scales", lambda s: s.transpose(0, 1).contiguous().transpose(0, 1), ValueError),
    ],
)
def test_bad_scales_are_named(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None], error: type[Exception]
) -> None:
    inputs, scales = quantise(make_inputs(3, 272, 32, [2, 1], 2, torch.bfloat16))
    with pytest.raises(error, match=rf"^{name}: expected .* got .*; "):
        sentinel_moe(*inputs, **(scales | {name: change(scales[name])}))


@pytest.mark.parametrize("name", ["w13_scales", "w2_scales"])
def test_scales_of_wide_weights_are_refused(name: str) -> None:
    inputs = make_inputs(3, *ROUTING_SHAPE, 2, torch.bfloat16)
    _, scales = quantise(inputs)
    with pytest.raises(ValueError, match=rf"^{name}: expected none for weights of torch.bfloat16, got some; "):
        sentinel_moe(*inputs, **{name: scales[name]})


@pytest.mark.parametrize("name", ["w13_blocks", "w2_blocks"])
def test_weights_of_two_kinds_are_refused(name: str) -> None:
    inputs = make_inputs(3, *ROUTING_SHAPE, 2, torch.bfloat16)
    narrow, scales = quantise(inputs)
    with pytest.raises((TypeError, ValueError), match=r"^w[12]3?_(blocks|scales): expected .*, got .*; "):
        sentinel_moe(*narrow._replace(**{name: getattr(inputs, name)}), **scales)


def test_shapes_without_data() -> None:
    inputs, scales = quantise(make_inputs(3, 272, 32, [2, 1], 2, torch.bfloat16))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        fake_scales = {name: mode.from_tensor(tensor) for name, tensor in scales.items()}
        out = sentinel_moe(*fakes, **fake_scales, max_blocks_per_expert=2)
    assert (out.shape, out.dtype) == (inputs.x.shape, torch.bfloat16)


@pytest.mark.slow
def test_op_passes_torchs_own_checks() -> None:
    inputs, scales = quantise(make_inputs(3, *ROUTING_SHAPE, 2, torch.float32))
    checks = ("test_autograd_registration", "test_faketensor")  # torch's of schemas multiplies 8-bit numbers
    op = torch.ops.laguna_serve.sentinel_moe.default
    torch.library.opcheck(op, (*inputs, *scales.values(), 4), test_utils=checks)


def test_compiled_graph_keeps_the_op_whole() -> None:
    inputs, scales = quantise(make_inputs(3, *ROUTING_SHAPE, 2, torch.float32))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return sentinel_moe(x + 1, *inputs[1:], **scales, max_blocks_per_expert=4) * 2

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs.x), layer(inputs.x))
