"""The router on a GPU is vLLM's kernel: what it is asked for, on a CPU by a stand-in; its choices, on a GPU, ours."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import _custom_ops, forward_context

from laguna_serve.plugins.models import routing
from laguna_serve.plugins.models.routing import route, route_by_vllm

pytestmark = pytest.mark.vllm

E, K, SCALE = 32, 4, 2.5


def draw(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits, bias = torch.randn(tokens, E, generator=generator), torch.randn(E, generator=generator)
    return logits.to(device), bias.to(device)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:
    """vLLM 0.32's, in torch."""
    assert topk_ids.dtype == token_expert_indices.dtype == torch.int32
    assert e_score_correction_bias is not None
    weights, ids = route(gating_output, e_score_correction_bias, topk_ids.shape[1], renormalize=renormalize)
    topk_weights.copy_(weights * routed_scaling_factor)
    topk_ids.copy_(ids if is_padding is None else ids.masked_fill(is_padding[:, None], -1))


def topk_sigmoid_of_old(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
) -> None:
    """One that knows neither scale nor mask."""
    topk_sigmoid(topk_weights, topk_ids, token_expert_indices, gating_output, renormalize, e_score_correction_bias)


@pytest.mark.parametrize("kernel", [topk_sigmoid, topk_sigmoid_of_old])
@pytest.mark.parametrize("renormalize", [True, False])
def test_vllms_kernel_is_asked_for_what_the_model_needs(
    kernel: Callable[..., None], renormalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_custom_ops, "topk_sigmoid", kernel)
    logits, bias = draw(7)
    for mine, right in zip(
        route_by_vllm(logits, bias, K, renormalize, SCALE),
        route(logits, bias, K, renormalize=renormalize, scale=SCALE),
        strict=True,
    ):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("kernel", [topk_sigmoid, topk_sigmoid_of_old])
def test_rows_that_fill_up_a_graph_choose_no_expert(
    kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_custom_ops, "topk_sigmoid", kernel)
    context = SimpleNamespace(is_padding=torch.arange(16) >= 5)
    monkeypatch.setattr(forward_context, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)
    logits, bias = draw(8)
    _, ids = route_by_vllm(logits, bias, K, True, SCALE)
    assert torch.equal(ids[:5], route(logits, bias, K, renormalize=True)[1][:5])
    assert (ids[5:] == -1).all()
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    assert (route_by_vllm(logits, bias, K, True, SCALE)[1] >= 0).all()


def test_vllm_still_has_the_kernel_and_the_mask() -> None:
    assert set(routing._list_parameters(_custom_ops.topk_sigmoid)) >= {
        *("topk_weights", "topk_ids", "token_expert_indices", "gating_output", "renormalize"),
        *("e_score_correction_bias", "routed_scaling_factor", "is_padding"),
    }
    assert "is_padding" in forward_context.ForwardContext.__dataclass_fields__


def test_a_graph_knows_the_shapes() -> None:
    weights, ids = routing._route_fake(torch.empty(3, E, device="meta"), torch.empty(E), K, True, SCALE)
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((3, K), torch.float32, (3, K), torch.int32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_on_a_gpu_it_chooses_as_ours(tokens: int) -> None:
    """The same experts; the weights to two units of their last place, as sums of k scores are ordered otherwise."""
    logits, bias = draw(tokens, "cuda")
    weights, ids = route(logits, bias, K, renormalize=True, scale=SCALE)
    right, chosen = route(logits.cpu(), bias.cpu(), K, renormalize=True, scale=SCALE)
    assert torch.equal(ids.cpu(), chosen)
    torch.testing.assert_close(weights.cpu(), right, rtol=3e-7, atol=0)
