"""A draft's matrices in fewer bits, by torchao: those of its layers; embedding, norms and head stay what they are.

A draft only proposes, so that no text depends on its bits, and what it forgets costs acceptance alone.

| | a GPU | a CPU |
|--|--|--|
| fp8 | e4m3, rows of activations in FP8 as well (compute capability 8.9 on) | e4m3, widened for each product |
| int8 | a byte and a scale a row, widened in the product | the same |
| int4 | four bits, a scale for 128 weights (torchao wants mslk) | values of four bits, a byte each |

Checked against torchao 0.18.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.server.options import DRAFT_WEIGHTS, require_torchao

INT4_GROUP = 128


def quantise(model: Llada, weights: str) -> None:
    """Store the matrices of the model's layers as fp8, int8 or int4, in place; "target" leaves them.

    Raises:
        DiffusionError: torchao is not there, or cannot do it on this device or in this shape.
    """
    if weights == DRAFT_WEIGHTS[0]:
        return
    require_torchao(weights)
    from torchao.quantization import quantize_

    device = model.embedding.weight.device
    try:
        for block in model.blocks:
            quantize_(block, _configure(weights, device.type, _find_group(block)), _is_matrix)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        flag = f"--draft-weights {weights}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DiffusionError(f"{flag}: expected {device} to take it, torchao says: {reason}; choose another") from None


def count_stored_bytes(tensor: torch.Tensor) -> int:
    """Count what a weight is stored in; of torchao's, all its parts."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(count_stored_bytes(getattr(tensor, name)) for name in flatten()[0])


def _configure(weights: str, device: str, group: int) -> Any:
    from torchao import quantization as ao

    if weights == "int8":
        return ao.Int8WeightOnlyConfig()
    if weights == "fp8":
        if device == "cpu":
            return ao.Float8WeightOnlyConfig()
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    if device == "cpu":
        four_bits = torch.int4  # type: ignore[attr-defined]
        return ao.IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=ao.PerGroup(group))
    return ao.Int4WeightOnlyConfig(group_size=group)


def _find_group(block: nn.Module) -> int:
    """Find the widest group of weights with a scale, at most INT4_GROUP, that every row of a layer is a multiple of."""
    widths = [module.in_features for module in block.modules() if isinstance(module, nn.Linear)]
    group = INT4_GROUP
    while any(width % group for width in widths):
        group //= 2
    return group


def _is_matrix(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear)
