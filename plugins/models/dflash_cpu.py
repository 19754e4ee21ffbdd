"""DFlash drafters on a CPU: their two classes with vLLM's grouped norms fixed, and their context's products packed.

A drafter turns the target's hidden states into the keys and values of all its layers at once and normalises them with
one call whose weights have a row per layer.  vLLM's CPU `rms_norm` takes the first row for every layer, and reads an
expanded (stride 0) input as if it were contiguous, out of bounds: with two layers or more, acceptance falls to
nothing and the text can be corrupted.  Here the mean square is taken once and each layer's row is applied to it.

vLLM makes those keys and values with torch's products, which arrange a matrix in bfloat16 for the processor anew in
every call: for five layers of 2048 × 2048 and one row that takes as long as the products themselves.  Here they are
multiplied as vLLM's linear layers are, arranged once, or as plugins/cpu_linear.py has these where it takes over.

Checked against vLLM 0.32.0.  The norms can go when
`tests/plugins/test_dflash.py::test_stock_grouped_norm_ignores_the_layer` fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers import utils
from vllm.model_executor.models import qwen3_dflash

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.models import dflash


def grouped_rms_norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension with one weight row per layer, in fp32.

    x [L, …, D], or [1, …, D] for the same input in every layer; weights [L, D].  Returns [L, …, D] in x's dtype.
    """
    return _norm(x, weights.view(weights.shape[0], *[1] * (x.dim() - 2), weights.shape[1]), eps)


def _norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension in fp32, by weights of any shape that fits x's; in x's dtype.

    Few operations: each costs a small drafter's step as much as its arithmetic.
    """
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    return normed.mul(weights).to(x.dtype)


def normalize_context_k(self: Any, all_k: torch.Tensor) -> torch.Tensor:
    """Keys [L, T, kv_heads, head_dim], each layer's normalised with its own weights."""
    return grouped_rms_norm(all_k, self._k_norm_weights, self._rms_norm_eps)


def build_context_buffers(self: Any) -> None:
    """Note what the context is made with, as vLLM does when weights are loaded, and arrange its matrices once."""
    type(self)._build_fused_kv_buffers(self)
    if (taps := getattr(self, "aux_hidden_norms", None)) is not None:
        self._tap_norm_weights = torch.stack([norm.weight.data for norm in taps])
    if hasattr(self, "_input_layernorm_weights"):
        keep_products(self, list(self._kv_weights))
    elif self._fused_kv_weight is not None:
        keep_products(self, [self._fused_kv_weight])


def keep_products(model: Any, weights: Sequence[torch.Tensor]) -> None:
    """Have a model multiply with matrices, each [N, K], as its linear layers do; again for their new values.

    They are modules, so that new weights reach them and digests count them (plugins/staging.py, weight_digests.py).
    """
    if not hasattr(model, "context_products"):
        model.context_products = nn.ModuleList(nn.Module() for _ in weights)
    for product, weight in zip(model.context_products, weights, strict=True):
        product.weight = weight
        utils.dispatch_cpu_unquantized_gemm(product, remove_weight=False)


def project_context_kv(
    self: Any, context_states: torch.Tensor, num_ctx: int, num_layers: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [L, T, kv_heads, head_dim], of context states [T, hidden] under every layer's own norm."""
    normed = grouped_rms_norm(context_states.unsqueeze(0), self._input_layernorm_weights, self._rms_norm_eps)
    products = zip(self.context_products, normed, strict=True)
    kv = torch.stack([product.cpu_linear(rows, product.weight, None) for product, rows in products])
    if self._kv_biases is not None:
        kv += self._kv_biases[:, None, :]
    keys, values = kv.view(num_layers, num_ctx, 2, num_kv_heads, head_dim).unbind(2)
    return keys, values


def project_shared_kv(
    self: Any, context_states: torch.Tensor, num_ctx: int, num_layers: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as `project_context_kv` has them, of context states under one norm for all layers."""
    if self._fused_kv_weight is None:
        kv: tuple[torch.Tensor, torch.Tensor] = type(self)._project_context_kv(
            self, context_states, num_ctx, num_layers, num_kv_heads, head_dim
        )
        return kv
    normed = torch.empty_like(context_states)
    ops.rms_norm(normed, context_states, self._hidden_norm_weight, self._rms_norm_eps)
    product = self.context_products[0]
    flat = product.cpu_linear(normed, product.weight, None)
    if self._fused_kv_bias is not None:
        flat += self._fused_kv_bias
    keys, values = flat.view(num_ctx, num_layers, 2, num_kv_heads, head_dim).permute(2, 1, 0, 3, 4)
    return keys, values


class DFlashLagunaForCausalLM(dflash.DFlashLagunaForCausalLM):
    """The Laguna-style drafter (full vocabulary, embedding and head shared with the target)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model._build_fused_kv_buffers = MethodType(build_context_buffers, self.model)
        self.model._project_context_kv = MethodType(project_context_kv, self.model)
        self.model._normalize_context_k = MethodType(normalize_context_k, self.model)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Context states [T, hidden] from the target's taps side by side [T, taps · hidden].

        vLLM normalises the taps one after the other; at once it takes a fraction of the operations, which is what a
        step of a small drafter costs on a CPU.
        """
        taps = hidden_states.view(hidden_states.shape[0], self.model.num_aux_slices, -1)
        normed = _norm(taps, self.model._tap_norm_weights, self.config.rms_norm_eps).view_as(hidden_states)
        states: torch.Tensor = self.model.hidden_norm(self.model.fc(normed))
        return states


def rename(name: str) -> str:
    """Give the parameter's name of a drafter's tensor."""
    return name.replace("d2t", "draft_id_to_target_id")


class DFlashQwen3ForCausalLM(qwen3_dflash.DFlashQwen3ForCausalLM):  # type: ignore[misc]
    """The Qwen3-style drafter (speculators format); its context has one norm for all layers, its keys one each."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model._build_fused_kv_buffers = MethodType(build_context_buffers, self.model)
        self.model._project_context_kv = MethodType(project_shared_kv, self.model)
        self.model._normalize_context_k = MethodType(normalize_context_k, self.model)
        self.shared_parameters = ["model.embed_tokens.weight"]
        if self.draft_id_to_target_id is None:
            self.shared_parameters.append("lm_head.weight")
        if not self.model.use_aux_hidden_state:
            self.shared_parameters.append("model.fc.weight")

    @partial(refuse_incomplete, rename=rename)
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a drafter's tensors."""
        super().load_weights(weights)
