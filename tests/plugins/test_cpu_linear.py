"""Linear layers on a processor held to AVX2: what stock vLLM does, and that every layer of a model takes ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from probes import run_probe

from laguna_serve.plugins import cpu_linear

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"


@pytest.fixture(scope="module")
def held_to_avx2() -> dict[str, Any]:
    return run_probe("linear_probe.py", str(TOY / "teacher"), str(TOY / "prompts.jsonl"))  # type: ignore[no-any-return]


def test_stock_falls_back_to_torch(held_to_avx2: dict[str, Any]) -> None:
    """When this fails, oneDNN multiplies in bfloat16 there: time it against ours, and retire `plugins/cpu_linear.py`.

    vLLM gives a layer's weight to oneDNN and empties it; where oneDNN refuses, the weight stays for torch. Small ones
    may go to another kernel, which does not know oneDNN's limit.
    """
    assert held_to_avx2["stock_keeps_the_weight"]


def test_every_bf16_layer_takes_the_op(held_to_avx2: dict[str, Any]) -> None:
    assert held_to_avx2["wrapped_once"]
    assert held_to_avx2["torch.bfloat16"]
    assert not held_to_avx2["torch.float32"]
    assert held_to_avx2["layers"]["all"] == held_to_avx2["layers"]["ours"] > 30


def test_the_model_still_writes_code(held_to_avx2: dict[str, Any]) -> None:
    """By what it learned: a product that is off by more than rounding writes nothing of the kind."""
    assert all(text.strip() for text in held_to_avx2["texts"])
    assert any("return" in text or "=" in text for text in held_to_avx2["texts"])


@pytest.mark.parametrize("library", [None, len], ids=["no compiler", "a library"])
@pytest.mark.parametrize(
    ("weight", "taken"),
    [
        (torch.zeros(4, 8, dtype=torch.bfloat16), True),
        (torch.zeros(4, 8), False),
        (torch.zeros(4, 8, dtype=torch.float16), False),
        (torch.zeros(4, 1, 4, dtype=torch.bfloat16), False),
        (torch.zeros(8, 4, dtype=torch.bfloat16).T, False),
        (torch.zeros(4, 8, dtype=torch.bfloat16, device="meta"), False),
    ],
    ids=["bf16", "fp32", "fp16", "convolution", "turned over", "missing"],
)
def test_others_are_left_to_vllm(
    library: Any, weight: torch.Tensor, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "load_library", lambda: library)
    left: list[tuple[Any, bool]] = []
    layer = torch.nn.Module()
    layer.weight = weight
    cpu_linear.wrap_dispatch(lambda layer, remove_weight: left.append((layer, remove_weight)))(layer, True)
    taken = taken and library is not None
    assert left == ([] if taken else [(layer, True)])
    assert (getattr(layer, "cpu_linear", None) is cpu_linear.linear) == taken
    assert layer.weight is weight


def test_layer_with_a_wide_bias_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "load_library", lambda: len)
    left: list[Any] = []
    layer = torch.nn.Linear(4, 8, dtype=torch.bfloat16)
    layer.bias = torch.nn.Parameter(torch.zeros(8))
    dispatch = cpu_linear.wrap_dispatch(lambda layer, remove_weight: left.append(layer))
    dispatch(layer, False)
    dispatch(torch.nn.Linear(4, 8, dtype=torch.bfloat16), False)
    assert left == [layer]


@pytest.mark.parametrize("ours", [True, False])
def test_some_processors_keep_vllms_own(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import utils

    def stock(layer: torch.nn.Module, remove_weight: bool) -> None: ...

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", stock)
    monkeypatch.setattr(cpu_linear, "uses_linear_op", lambda: ours)
    cpu_linear.accelerate_linear()
    assert (utils.dispatch_cpu_unquantized_gemm is stock) != ours


def make_projection() -> Any:
    """What a drafter's model holds for its context's keys and values: 2 layers, hidden 32, 1 head of 8."""
    torch.manual_seed(0)
    model, weights = torch.nn.Module(), torch.randn(2, 16, 32).bfloat16()
    vars(model).update(
        _input_layernorm_weights=torch.rand(2, 32).bfloat16(),
        _hidden_norm_weight=torch.rand(32).bfloat16(),
        _rms_norm_eps=1e-6,
        _num_attn_layers=2,
        _num_kv_heads=1,
        _head_dim=8,
        _kv_weights=weights,
        _kv_biases=torch.randn(2, 16).bfloat16(),
        _fused_kv_weight=weights.flatten(0, 1),
        _fused_kv_bias=torch.randn(32).bfloat16(),
    )
    return model


@pytest.mark.parametrize("ours", [False, True])
def test_context_of_a_drafter_is_multiplied_as_linear_layers_are(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    from laguna_serve.plugins.models import dflash_cpu

    stock = utils.dispatch_cpu_unquantized_gemm
    stock = getattr(stock, "__wrapped__", stock)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", cpu_linear.wrap_dispatch(stock) if ours else stock)
    torch.manual_seed(0)
    states = torch.randn(5, 32).bfloat16()
    each, shared = make_projection(), make_projection()
    folded = dflash_cpu.fold(each._kv_weights, each._input_layernorm_weights)
    each._fused_kv_bias = each._kv_biases.flatten()
    for model, weight in ((each, folded), (shared, shared._fused_kv_weight)):
        dflash_cpu.keep_product(model, weight, model._fused_kv_bias)
    assert [model.context_product.cpu_linear is cpu_linear.linear for model in (each, shared)] == [ours] * 2
    each._context_norm_weight = torch.ones(32).bfloat16()
    shared._context_norm_weight = shared._hidden_norm_weight

    found = dflash_cpu.project_context(each, states)
    normed = F.rms_norm(states.float(), (32,), eps=1e-6) * each._input_layernorm_weights.float().unsqueeze(1)
    kv = torch.bmm(normed, each._kv_weights.float().transpose(1, 2)) + each._kv_biases.float()[:, None]
    expected = kv.bfloat16().view(2, 5, 2, 1, 8).permute(2, 0, 1, 3, 4)
    theirs = DFlashQwen3Model._project_context_kv(shared, states, 5, 2, 1, 8)
    own = dflash_cpu.project_context(shared, states)
    for one, other in (*zip(found, expected, strict=True), *zip(own, theirs, strict=True)):
        assert one.shape == other.shape == (2, 5, 1, 8)
        torch.testing.assert_close(one, other, rtol=2e-2, atol=4e-2)


def test_rows_at_positions_that_a_drafter_does_not_know_are_stored_as_at_its_last() -> None:
    from laguna_serve.plugins.models import dflash_cpu

    model, stored = make_projection(), list[Any]()
    dflash_cpu.keep_product(model, model._fused_kv_weight, model._fused_kv_bias)
    writer = SimpleNamespace(do_kv_cache_update=lambda *args: stored.append(args))
    attention = SimpleNamespace(impl=writer, kv_cache=None)
    for name, value in {
        "_context_norm_weight": model._hidden_norm_weight,
        "_key_norms": torch.ones(2, 8),
        "_rope_cos_sin_cache": torch.rand(4, 8).bfloat16(),
        "_rope_is_neox": True,
        "_attn_layers": [attention, attention],
        "layers": [SimpleNamespace(self_attn=None)],
    }.items():
        setattr(model, name, value)
    states, slots = torch.randn(1, 32).bfloat16(), torch.zeros(1, dtype=torch.int64)
    for position in (3, 4, 300_000):
        dflash_cpu.store_context(model, states, torch.tensor([position]), slots)
    keys = [keys for _, keys, *_ in stored]
    assert all(torch.equal(key, keys[layer % 2]) for layer, key in enumerate(keys))


def test_a_new_matrix_of_a_context_takes_the_place_of_the_old() -> None:
    from laguna_serve.plugins.models import dflash_cpu

    model, rows = torch.nn.Module(), torch.randn(3, 32).bfloat16()
    for _ in range(2):
        weight = torch.randn(16, 32).bfloat16()
        dflash_cpu.keep_product(model, weight, None)
        product = model.context_product
        torch.testing.assert_close(
            product.cpu_linear(rows, product.weight, None), rows @ weight.T, rtol=2e-2, atol=2e-2
        )


def test_stored_models_with_and_without_the_op_have_unlike_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from laguna_serve.plugins.repairs import compilation

    monkeypatch.setattr(compilation, "stock_factors", lambda *args: ["stock"])
    names = []
    for ours in (False, True):
        monkeypatch.setattr(compilation, "takes_over", lambda ours=ours: ours)
        names.append(compilation.list_factors(None))
    assert names[0][0] == "stock"
    assert names[0] != names[1]
