"""Checkpoints in FP8 on our own model classes: what vLLM's quantisation does for them, and what is done here.

On a GPU vLLM's own kernels compute the linear layers in FP8. On a CPU vLLM 0.32 has such kernels for processors with
AMX alone, and those want tiles of 32: here every FP8 linear layer is dequantised once, while it is loaded, and computed
in the engine's dtype, on every processor alike. Routed experts stay in FP8 on both (sentinel_moe takes them so), and
scales of an FP8 KV cache go to vLLM's attention.

Rounded to bf16, a dequantised weight loses up to half a unit in its last place (2⁻⁹ of its value); in fp32 it is exact.

Read in vLLM 0.32.0 (quantization/compressed_tensors, layers/attention/attention.py, kernels/linear/scaled_mm/cpu.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from laguna_serve.plugins.formats.experts import COMPRESSED_TENSORS
from laguna_serve.plugins.formats.fp8 import DTYPE, dequantise_blocks

EXPERTS, FEED_FORWARD = ".mlp.experts.", ".mlp."
WEIGHT, SCALE = ".weight", ".weight_scale"


class LoadError(ValueError):
    """Quantised tensors that do not go together, as one line."""


def dequantises(vllm_config: VllmConfig) -> bool:
    """Whether FP8 linear layers are dequantised while they are loaded."""
    return vllm_config.quant_config is not None and current_platform.is_cpu()


def build_unquantised(vllm_config: VllmConfig, *, only_feed_forward: bool) -> VllmConfig:
    """Copy the configuration so that it builds linear layers plain: all of them, or those of an `mlp` alone.

    Attention keeps its quantisation method, which loads the scales of the KV cache.
    """
    made = copy.copy(vllm_config)
    if vllm_config.quant_config is not None:
        made.quant_config = leave_out(vllm_config.quant_config, FEED_FORWARD if only_feed_forward else "")
    return made


def leave_out(quant_config: QuantizationConfig, part: str) -> QuantizationConfig:
    """Return the quantisation without linear layers that have `part` in their name."""
    made = copy.copy(quant_config)

    def choose(layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase) and part in prefix:
            return UnquantizedLinearMethod()
        return quant_config.get_quant_method(layer, prefix)

    made.get_quant_method = choose
    return made


def check_method(vllm_config: VllmConfig, name: str, remedy: str) -> None:
    """Raise ValueError for another quantisation than compressed-tensors; what of it is stored the tensors say."""
    quant_config = vllm_config.quant_config
    if quant_config is not None and quant_config.get_name() != COMPRESSED_TENSORS:
        method = quant_config.get_name()
        raise ValueError(f"{name}: expected unquantised weights or compressed-tensors in FP8, got {method}; {remedy}")


def dequantise_linears(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Dequantise FP8 matrices of linear layers to fp32, when both parts have come; pass other tensors on.

    Raises:
        LoadError: a matrix without scales of its blocks, or in another format.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        quantised = name.endswith(SCALE) or (name.endswith(WEIGHT) and tensor.dtype == DTYPE)
        if EXPERTS in name or not quantised:
            yield name, tensor
            continue
        layer = name.removesuffix(SCALE).removesuffix(WEIGHT)
        other = waiting.pop(layer, None)
        if other is None:
            waiting[layer] = tensor
            continue
        values, scale = (other, tensor) if other.dtype == DTYPE else (tensor, other)
        _check_blocks(layer, values, scale)
        yield layer + WEIGHT, dequantise_blocks(values, scale)
    if waiting:
        layer = min(waiting)
        found = "its values" if waiting[layer].dtype == DTYPE else "its scales"
        raise LoadError(f"{layer}: expected FP8 values and scales, got {found} alone; fetch the checkpoint again")


def _check_blocks(layer: str, values: torch.Tensor, scale: torch.Tensor) -> None:
    expected = [-(-size // 128) for size in values.shape]
    if list(scale.shape) != expected or values.dtype != DTYPE:
        got = f"{list(scale.shape)} for {list(values.shape)} in {values.dtype}"
        raise LoadError(f"{layer}: expected FP8 with a scale for each 128×128 block {expected}, got {got}")
