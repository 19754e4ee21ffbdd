"""`--load-format laguna-random`: what it makes of parameters, and that tokens then choose experts of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.vllm

TOKENS, WIDTH, EXPERTS, CHOSEN = 8, 256, 64, 8


class Router(nn.Module):
    """A norm, a gate and the bias that corrects its choice, named as vLLM's Laguna has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.gate = nn.Parameter(torch.empty(EXPERTS, WIDTH))
        self.e_score_correction_bias = nn.Parameter(torch.empty(EXPERTS))
        self.weight_scale = nn.Parameter(torch.full((EXPERTS, 1), 3.0))
        self.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)

    def count_experts(self, hidden: torch.Tensor) -> int:
        """How many different experts a batch of tokens reads."""
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        scores = torch.sigmoid(normed @ self.gate.T) + self.e_score_correction_bias
        return len(scores.topk(CHOSEN).indices.unique())


def test_tokens_choose_experts_of_their_own_where_vllms_dummy_gives_all_the_same() -> None:
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    from laguna_serve.plugins.random_weights import fill_parameters

    router, hidden = Router(), torch.empty(TOKENS, WIDTH).uniform_(-1e-3, 1e-3)
    with torch.no_grad():
        for name in ("norm", "gate", "e_score_correction_bias"):
            initialize_single_dummy_weight(getattr(router, name))
        assert router.count_experts(hidden) <= CHOSEN + 2
        fill_parameters(router)
        assert router.count_experts(torch.randn(TOKENS, WIDTH)) > 3 * CHOSEN


def test_norms_are_one_biases_none_and_what_is_quantised_is_left() -> None:
    from laguna_serve.plugins.random_weights import fill_parameters

    router = Router()
    fill_parameters(router)
    assert router.norm.unique().tolist() == [1.0]
    assert router.e_score_correction_bias.unique().tolist() == [0.0]
    assert router.weight_scale.unique().tolist() == [3.0]
    assert router.packed.unique().tolist() == [0]
    assert router.gate.std().item() == pytest.approx(WIDTH**-0.5, rel=0.1)
    again = Router()
    fill_parameters(again)
    assert torch.equal(router.gate, again.gate)


@pytest.mark.parametrize("reduced", [True, False], ids=["reduced vocabulary", "the target's"])
def test_a_drafter_is_finished_as_its_own_loader_would(reduced: bool) -> None:
    from types import SimpleNamespace

    from laguna_serve.plugins.random_weights import BUILD, finish_drafter

    built: list[bool] = []
    model = SimpleNamespace(draft_id_to_target_id=torch.zeros(4) if reduced else None)
    finish_drafter(model, SimpleNamespace(**{BUILD: lambda: built.append(True)}))
    assert (built, model.has_own_lm_head, model.has_own_embed_tokens) == ([True], reduced, False)


class Blocks(nn.Module):
    """Weights in FP8 with a scale for 128 columns, and the scales of a KV cache, as vLLM's dummy loader leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.w2_blocks = nn.Parameter(torch.zeros(8, 16, 1024).to(torch.float8_e4m3fn), requires_grad=False)
        self.w2_scales = nn.Parameter(torch.full((8, 16, 8), -1e-3), requires_grad=False)
        self.k_scale = nn.Parameter(torch.tensor(-1e-3), requires_grad=False)


def test_weights_in_fp8_have_a_real_model_s_size() -> None:
    from laguna_serve.plugins.formats.fp8 import dequantise_atoms
    from laguna_serve.plugins.random_weights import fill_parameters

    blocks = Blocks()
    fill_parameters(blocks)
    weights = dequantise_atoms(blocks.w2_blocks, blocks.w2_scales)
    assert weights.std().item() == pytest.approx(1024**-0.5, rel=0.1)
    assert torch.isfinite(weights).all()
    assert blocks.k_scale == 1.0
