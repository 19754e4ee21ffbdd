"""DFlash drafters on a CPU: their two classes with vLLM's grouped norms fixed, and their context's products packed.

A drafter turns the target's hidden states into the keys and values of all its layers at once and normalises them with
one call whose weights have a row per layer.  vLLM's CPU `rms_norm` takes the first row for every layer, and reads an
expanded (stride 0) input as if it were contiguous, out of bounds: with two layers or more, acceptance falls to
nothing and the text can be corrupted.  Here rows are normalised by it with weights of one, and multiplied by their own.

vLLM makes those keys and values with torch's products, which arrange a matrix in bfloat16 for the processor anew in
every call: for five layers of 2048 × 2048 and one row that takes as long as the products themselves.  Here they are
multiplied as vLLM's linear layers are, arranged once, or as plugins/cpu_linear.py has these where it takes over.  Where
every layer has a norm of its own before its matrix (Laguna's), the norms' weights are multiplied into the matrices, so
that one product serves all layers: each operation costs a small drafter's step as much as its arithmetic.

Checked against vLLM 0.32.0.  The norms can go when
`tests/plugins/test_dflash.py::test_stock_grouped_norm_ignores_the_layer` fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers import utils
from vllm.model_executor.models import qwen3_dflash

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.models import dflash


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: x [..., D] contiguous, weight [D]; in x's dtype."""
    normed = torch.empty_like(x)
    ops.rms_norm(normed, x, weight, eps)
    return normed


def normalize_grouped(x: torch.Tensor, weights: torch.Tensor, ones: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension with weights of any shape that fits x's; ones [D] and weights in x's dtype."""
    return normalize(x, ones, eps).mul_(weights)


def build_context_buffers(self: Any) -> None:
    """Note what the context is made with, as vLLM does when weights are loaded, and arrange its matrix once."""
    type(self)._build_fused_kv_buffers(self)
    self._head_ones = torch.ones_like(self._k_norm_weights[0])
    if (taps := getattr(self, "aux_hidden_norms", None)) is not None:
        self._tap_norm_weights = torch.stack([norm.weight.data for norm in taps])
        self._tap_ones = torch.ones_like(self._tap_norm_weights[0])
    if hasattr(self, "_input_layernorm_weights"):
        self._context_norm_weight = torch.ones_like(self._input_layernorm_weights[0])
        self._fused_kv_bias = None if self._kv_biases is None else self._kv_biases.flatten()
        keep_product(self, fold(self._kv_weights, self._input_layernorm_weights))
        del self._kv_weights  # vLLM's copy of the layers' matrices, which nothing reads any more
    else:
        self._context_norm_weight = self._hidden_norm_weight
        if self._fused_kv_weight is not None:
            keep_product(self, self._fused_kv_weight)


def fold(matrices: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """One matrix [L · N, K] of matrices [L, N, K] behind norms [L, K], for rows that are normalised without them."""
    folded = matrices.float() * norms.float().unsqueeze(1)
    return folded.flatten(0, 1).to(matrices.dtype)


def keep_product(model: Any, weight: torch.Tensor) -> None:
    """Have a model multiply with a matrix [N, K] as its linear layers do; again for its new values.

    It is a module, so that new weights reach it and digests count it (plugins/staging.py, weight_digests.py).
    """
    if not hasattr(model, "context_product"):
        model.context_product = nn.Module()
    model.context_product.weight = weight
    utils.dispatch_cpu_unquantized_gemm(model.context_product, remove_weight=False)


def project_context_kv(
    self: Any, context_states: torch.Tensor, num_ctx: int, num_layers: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [L, T, kv_heads, head_dim], of context states [T, hidden]; the keys contiguous."""
    if not hasattr(self, "context_product"):  # quantized, so that there is no matrix to arrange
        kv: tuple[torch.Tensor, torch.Tensor] = type(self)._project_context_kv(
            self, context_states, num_ctx, num_layers, num_kv_heads, head_dim
        )
        return kv
    product = self.context_product
    normed = normalize(context_states, self._context_norm_weight, self._rms_norm_eps)
    flat = product.cpu_linear(normed, product.weight, self._fused_kv_bias)
    keys, values = flat.view(num_ctx, num_layers, 2, num_kv_heads, head_dim).permute(2, 1, 0, 3, 4)
    return keys.contiguous(), values


def normalize_context_k(self: Any, all_k: torch.Tensor) -> torch.Tensor:
    """Keys [L, T, kv_heads, head_dim], each layer's normalised with its own weights."""
    weights = self._k_norm_weights[:, None, None]
    return normalize_grouped(all_k, weights, self._head_ones, self._rms_norm_eps)


def make_context(model: Any) -> None:
    """Have a loaded drafter's model make its context as above."""
    for name, function in (
        ("_build_fused_kv_buffers", build_context_buffers),
        ("_project_context_kv", project_context_kv),
        ("_normalize_context_k", normalize_context_k),
    ):
        setattr(model, name, MethodType(function, model))


class DFlashLagunaForCausalLM(dflash.DFlashLagunaForCausalLM):
    """The Laguna-style drafter (full vocabulary, embedding and head shared with the target)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        make_context(self.model)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Context states [T, hidden] from the target's taps side by side [T, taps · hidden].

        vLLM normalises the taps one after the other; at once it takes a fraction of the operations, which is what a
        step of a small drafter costs on a CPU.
        """
        model, eps = self.model, self.config.rms_norm_eps
        taps = hidden_states.view(len(hidden_states), model.num_aux_slices, -1)
        normed = normalize_grouped(taps, model._tap_norm_weights, model._tap_ones, eps).view_as(hidden_states)
        return normalize(model.fc(normed), model.hidden_norm.weight, eps)


def rename(name: str) -> str:
    """Give the parameter's name of a drafter's tensor."""
    return name.replace("d2t", "draft_id_to_target_id")


class DFlashQwen3ForCausalLM(qwen3_dflash.DFlashQwen3ForCausalLM):  # type: ignore[misc]
    """The Qwen3-style drafter (speculators format); its context has one norm for all layers, its keys one each."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        make_context(self.model)
        self.shared_parameters = ["model.embed_tokens.weight"]
        if self.draft_id_to_target_id is None:
            self.shared_parameters.append("lm_head.weight")
        if not self.model.use_aux_hidden_state:
            self.shared_parameters.append("model.fc.weight")

    @partial(refuse_incomplete, rename=rename)
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a drafter's tensors."""
        super().load_weights(weights)
