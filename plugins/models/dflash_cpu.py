"""DFlash drafters on a CPU: their two classes with vLLM's grouped norms fixed, and their context's products packed.

A drafter turns the target's hidden states into the keys and values of all its layers at once and normalises them with
one call whose weights have a row per layer. vLLM's CPU `rms_norm` takes the first row for every layer, and reads an
expanded (stride 0) input as if it were contiguous, out of bounds: with two layers or more, acceptance falls to
nothing and the text can be corrupted. plugins/drafting/context.py has these norms, and the keys' rotation.

vLLM makes those keys and values with torch's products, which arrange a matrix in bfloat16 for the processor anew in
every call: for five layers of 2048 × 2048 and one row that takes as long as the products themselves. Here they are
multiplied as vLLM's linear layers are, arranged once, or as plugins/cpu_linear.py has these where it takes over. Where
every layer has a norm of its own before its matrix (Laguna's), the norms' weights are multiplied into the matrices, so
that one product serves all layers: each operation costs a small drafter's step as much as its arithmetic. Drafters in
bfloat16 have all of it done by one call (kernels/dflash_context) where plugins/cpu_linear.py takes over.

Checked against vLLM 0.32.0. The norms can go when
`tests/plugins/test_dflash.py::test_stock_grouped_norm_ignores_the_layer` fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models import qwen3_dflash

from laguna_serve.kernels.dflash_context import Context, Weights, make_context
from laguna_serve.plugins.cpu_linear import takes_over
from laguna_serve.plugins.drafting.context import finish_keys, normalize_slices, prepare
from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.models import dflash


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: x [..., D] contiguous, weight [D]; in x's dtype."""
    normed = torch.empty_like(x)
    ops.rms_norm(normed, x, weight, eps)
    return normed


def build_context_buffers(self: Any) -> None:
    """Note what the context is made with, as vLLM does when weights are loaded, and arrange its matrix once."""
    type(self)._build_fused_kv_buffers(self)
    self._key_norms = self._k_norm_weights.float()
    self._hidden_norm = self.hidden_norm.weight.data.float()
    if (taps := getattr(self, "aux_hidden_norms", None)) is not None:
        self._tap_norms = torch.stack([norm.weight.data for norm in taps]).float()
    if hasattr(self, "_input_layernorm_weights"):
        self._context_norm_weight = torch.ones_like(self._input_layernorm_weights[0])
        self._context_norm = self._context_norm_weight.float()
        self._fused_kv_bias = None if self._kv_biases is None else self._kv_biases.flatten()
        keep_product(self, fold(self._kv_weights, self._input_layernorm_weights), self._fused_kv_bias)
        del self._kv_weights  # vLLM's copy of the layers' matrices, which nothing reads any more
    else:
        self._context_norm_weight, self._context_norm = self._hidden_norm_weight, self._hidden_norm
        if self._fused_kv_weight is not None:
            keep_product(self, self._fused_kv_weight, self._fused_kv_bias)


def fold(matrices: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """One matrix [L · N, K] of matrices [L, N, K] behind norms [L, K], for rows that are normalised without them."""
    folded = matrices.float() * norms.float().unsqueeze(1)
    return folded.flatten(0, 1).to(matrices.dtype)


def keep_product(model: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Make a model multiply with a matrix [N, K] and a bias [N] as its linear layers do; again for their new values.

    It is a module, so that new weights reach it and digests count it (plugins/staging.py, weight_digests.py). vLLM may
    widen a layer's bias where it packs a matrix, so that the module has a bias of its own.
    """
    if not hasattr(model, "context_product"):
        model.context_product = nn.Module()
    model.context_product.weight = weight
    model.context_product.bias = None if bias is None else bias.clone()
    utils.dispatch_cpu_unquantized_gemm(model.context_product, remove_weight=False)


def project_context(self: Any, context_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [L, T, kv_heads, head_dim], of context states [T, hidden]; the keys not yet normalised."""
    shape = (len(context_states), self._num_attn_layers, self._num_kv_heads, self._head_dim)
    if not hasattr(self, "context_product"):  # quantized, so that there is no matrix to arrange
        kv: tuple[torch.Tensor, torch.Tensor] = type(self)._project_context_kv(self, context_states, *shape)
        return kv
    product, (rows, layers, heads, size) = self.context_product, shape
    normed = normalize(context_states, self._context_norm_weight, self._rms_norm_eps)
    flat = product.cpu_linear(normed, product.weight, product.bias)
    keys, values = flat.view(rows, layers, 2, heads, size).permute(2, 1, 0, 3, 4)
    return keys, values


def store_context(
    self: Any,
    context_states: torch.Tensor,
    context_positions: torch.Tensor,
    context_slot_mapping: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
) -> None:
    """`precompute_and_store_context_kv`: write every layer's keys and values of context states [T, hidden].

    Args:
        context_states: of combine_hidden_states.
        context_positions: [T].
        context_slot_mapping: [T], or one for each layer, None for those that write nothing; None for a trial.
    """
    keys, values = project_context(self, context_states)
    # A drafter may know fewer positions than its target, whose rows behind them are stored all the same.
    known = context_positions.clamp(0, len(self._rope_cos_sin_cache) - 1)
    angles = self._rope_cos_sin_cache.index_select(0, known)
    keys = finish_keys(keys, self._key_norms, self._rms_norm_eps, angles, neox=self._rope_is_neox)
    if context_slot_mapping is not None:
        write_context(self, keys, values, context_slot_mapping)


def write_context(
    self: Any, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor | Sequence[torch.Tensor | None]
) -> None:
    """Write keys and values [L, T, kv_heads, head_dim] to slots [T], or to a layer's own, None for none."""
    if (scale := getattr(self.layers[0].self_attn, "v_scale", None)) is not None:
        values.mul_(scale)
    for layer, attention in enumerate(self._attn_layers):
        own = slots if isinstance(slots, torch.Tensor) else slots[layer]
        if own is not None:
            attention.impl.do_kv_cache_update(attention, keys[layer], values[layer], attention.kv_cache, own)


def find_context(model: Any) -> Context | None:
    """Find the one call for a drafter's context, where all of it is in bfloat16 and linear layers are by our op."""
    fc, product = getattr(model, "fc", None), getattr(model, "context_product", None)
    if fc is None or product is None or not takes_over() or not isinstance(fc.quant_method, UnquantizedLinearMethod):
        return None
    tensors = (fc.weight, product.weight, model._rope_cos_sin_cache)
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return None
    folded = hasattr(model, "_input_layernorm_weights")
    weights = Weights(
        fc=fc.weight,
        kv=product.weight,
        kv_bias=model._fused_kv_bias,
        context_norm=model._context_norm,
        hidden_norm=model._hidden_norm if folded else None,
        tap_norms=getattr(model, "_tap_norms", None),
        key_norms=model._key_norms,
        angles=model._rope_cos_sin_cache,
        kv_heads=model._num_kv_heads,
        eps=model._rms_norm_eps,
        neox=model._rope_is_neox,
    )
    return make_context(weights)


class StoresTaps:
    """A drafter that makes its context by one call where it can.

    The call reads the model's own tensors, into which new weights are copied (plugins/staging.py).
    """

    model: Any

    @cached_property
    def _context(self) -> Context | None:
        if not hasattr(self.model, "_num_attn_layers"):  # a loader that does not go by load_weights
            self.model._build_fused_kv_buffers()
        context = find_context(self.model)
        if context is None:
            prepare()
        return context

    def prepare_context(self) -> None:
        """Build or compile what makes the context, so that no request waits for it."""
        _ = self._context

    def precompute_and_store_context_kv(
        self, context_states: torch.Tensor, context_positions: torch.Tensor, context_slot_mapping: Any = None
    ) -> None:
        """Write the context of combined hidden states; what is on trial, without slots, is the call that will do it."""
        if self._context is None or context_slot_mapping is not None:
            self.model.precompute_and_store_context_kv(context_states, context_positions, context_slot_mapping)

    def store_taps(self, taps: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values of the target's taps side by side [T, taps · hidden] at positions [T] to slots [T]."""
        if self._context is None:
            self.model.precompute_and_store_context_kv(self.combine_hidden_states(taps), positions, slots)  # type: ignore[attr-defined]
        else:
            write_context(self.model, *self._context.make(taps, positions), slots)


def replace_context(model: Any) -> None:
    """Make a loaded drafter's model compute its context as above."""
    for name, function in (
        ("_build_fused_kv_buffers", build_context_buffers),
        ("precompute_and_store_context_kv", store_context),
    ):
        setattr(model, name, MethodType(function, model))


class DFlashLagunaForCausalLM(StoresTaps, dflash.DFlashLagunaForCausalLM):
    """The Laguna-style drafter (full vocabulary, embedding and head shared with the target)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replace_context(self.model)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Context states [T, hidden] from the target's taps side by side [T, taps · hidden].

        vLLM normalises the taps one after the other; at once it takes a fraction of the operations, which is what a
        step of a small drafter costs on a CPU.
        """
        model, eps = self.model, self.config.rms_norm_eps
        normed = normalize_slices(hidden_states, model._tap_norms, eps)
        return normalize(model.fc(normed), model.hidden_norm.weight, eps)


def rename(name: str) -> str:
    """Give the parameter's name of a drafter's tensor."""
    return name.replace("d2t", "draft_id_to_target_id")


class DFlashQwen3ForCausalLM(StoresTaps, qwen3_dflash.DFlashQwen3ForCausalLM):  # type: ignore[misc]
    """The Qwen3-style drafter (speculators format); its context has one norm for all layers, its keys one each."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replace_context(self.model)
        self.shared_parameters = ["model.embed_tokens.weight"]
        if self.draft_id_to_target_id is None:
            self.shared_parameters.append("lm_head.weight")
        if not self.model.use_aux_hidden_state:
            self.shared_parameters.append("model.fc.weight")

    @partial(refuse_incomplete, rename=rename)
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a drafter's tensors."""
        super().load_weights(weights)
