"""Unpruned experts on a CPU: the grouped kernel over the checkpoint's own memory, and which layers it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from laguna_serve.kernels.sentinel_moe.reference import sentinel_moe_reference

pytestmark = pytest.mark.vllm
E, H, N, TOP_K = 6, 48, 32, 2


def make_layer() -> Any:
    layer = torch.nn.Module()
    for name, shape in (("w13_weight", (E, 2 * N, H)), ("w2_weight", (E, H, N))):
        setattr(layer, name, torch.nn.Parameter(torch.randn(shape).bfloat16() / 4, requires_grad=False))
    return layer


def apply(experts: Any, layer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What it writes, and what the specification says, for the weights as the checkpoint has them."""
    torch.manual_seed(tokens)
    x, weights = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, TOP_K)
    ids = torch.stack([torch.randperm(E)[:TOP_K] for _ in range(tokens)]).int()
    out = torch.empty_like(x)
    experts.apply(out, x, layer.w13_weight, layer.w2_weight, weights, ids, "silu", E, None)
    w13, w2 = layer.w13_weight.reshape(E, 2, N, H), layer.w2_weight.transpose(1, 2).contiguous()
    start = torch.arange(E + 1, dtype=torch.int32)
    return out, sentinel_moe_reference(x, weights, ids, w13, w2, start)


def test_whole_experts_are_blocks_and_take_new_weights() -> None:
    from laguna_serve.plugins.models.laguna_cpu import WholeExperts

    torch.manual_seed(0)
    layer, experts = make_layer(), WholeExperts.__new__(WholeExperts)
    stored = layer.w2_weight.clone()
    experts.process_weights_after_loading(layer)
    assert torch.equal(layer.w2_weight, stored)
    for tokens in (1, 9):
        torch.testing.assert_close(*apply(experts, layer, tokens), rtol=0.02, atol=0.02)
    place, before = layer.w2_weight.data_ptr(), apply(experts, layer, 5)[0]
    layer.w2_weight.data.copy_(torch.randn(E, H, N))
    experts.process_weights_after_loading(layer)
    assert layer.w2_weight.data_ptr() == place
    found, expected = apply(experts, layer, 5)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"in_dtype": torch.float32}, False),
        ({"activation": "gelu"}, False),
        ({"ep_size": 2}, False),
        ({"apply_router_weight_on_input": True}, False),
        ({"intermediate_size_per_partition": 24}, False),
        ({"hidden_dim": 40}, False),
        ({"experts_per_token": 17}, False),
        ({"experts_cls": object}, False),
        ({"LAGUNA_CPU_KERNELS": "vllm"}, False),
    ],
    ids=lambda value: next(iter(value), "as it is") if isinstance(value, dict) else None,
)
def test_which_layers_are_taken(change: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from laguna_serve.kernels import isa
    from laguna_serve.plugins.models import laguna_cpu

    wanted = change.get("LAGUNA_CPU_KERNELS", "")
    zen4 = {*isa.PATHS["avx512bf16"]}
    uses = isa.uses_own_experts
    monkeypatch.setattr(laguna_cpu, "uses_own_experts", lambda: uses(zen4, {"LAGUNA_CPU_KERNELS": wanted}))
    monkeypatch.setattr(laguna_cpu.sentinel_cpu, "load", lambda: object())
    settings: dict[str, Any] = {
        "in_dtype": torch.bfloat16,
        "activation": MoEActivation("silu"),
        "intermediate_size_per_partition": N,
        "hidden_dim": H,
        "experts_per_token": TOP_K,
        "ep_size": 1,
        "apply_router_weight_on_input": False,
        "experts_cls": laguna_cpu.CPUUnquantizedExperts,
    } | change
    moe = SimpleNamespace(**settings, moe_parallel_config=SimpleNamespace(ep_size=settings["ep_size"]))
    method = SimpleNamespace(moe=moe, experts_cls=settings["experts_cls"])
    on_input = settings["apply_router_weight_on_input"]
    layer = SimpleNamespace(quant_method=method, apply_router_weight_on_input=on_input)
    assert laguna_cpu.takes_experts(layer) is taken


@pytest.mark.parametrize(
    ("flags", "environ", "uses"),
    [
        ("amx", {}, True),
        ("avx512bf16", {}, True),
        ("avx512", {}, True),
        ("avx2", {}, True),
        ("neon", {}, False),
        ("portable", {}, False),
        ("avx2", {"LAGUNA_CPU_KERNELS": "vllm"}, False),
        ("avx512", {"LAGUNA_CPU_ISA": "portable"}, False),
    ],
)
def test_which_processors_use_it(flags: str, environ: dict[str, str], uses: bool) -> None:
    from laguna_serve.kernels.isa import PATHS, uses_own_experts

    assert uses_own_experts(PATHS[flags], environ) is uses
