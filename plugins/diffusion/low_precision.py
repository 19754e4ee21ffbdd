"""A draft's matrices in fewer bits, by torchao: those of its layers; embedding, norms and head stay what they are.

A draft only proposes, so that no text depends on its bits, and what it forgets costs acceptance alone.

| | a GPU | a CPU |
|--|--|--|
| fp8 | e4m3, rows of activations too; of bfloat16, from compute capability 8.9 on | e4m3, widened for each product |
| int8 | a byte and a scale a row, widened in the product | the same |
| int4 | four bits, a scale for 128 weights; of bfloat16, torchao wants mslk | values of four bits, a byte each |

Checked against torchao 0.18.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.server.options import DRAFT_WEIGHTS, require_torchao

# Weights with one scale in four bits, the most first, on a GPU and on a CPU: rows have to be multiples.
INT4_GROUPS = ((128, 64, 32), (128, 64, 32, 16, 8))


def quantise(model: Llada, weights: str) -> None:
    """Store the matrices of the model's layers as fp8, int8 or int4, in place; "target" leaves them.

    Raises:
        DiffusionError: torchao is not there, or cannot do it on this device or in this shape.
    """
    if weights == DRAFT_WEIGHTS[0]:
        return
    require_torchao(weights)
    from torchao.quantization import quantize_

    device, flag = model.embedding.weight.device, f"--draft-weights {weights}"
    for block in model.blocks:
        for matrix in [module for module in block.modules() if isinstance(module, nn.Linear)]:
            config = _configure(weights, device.type, matrix.in_features)
            try:
                quantize_(block, config, lambda module, _, matrix=matrix: module is matrix)
            except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                expected = f"expected {device} to take it"
                raise DiffusionError(f"{flag}: {expected}, torchao says: {reason}; choose another") from None
            if type(matrix.weight) is nn.Parameter:
                got = f"{matrix.out_features} × {matrix.in_features}"
                raise DiffusionError(f"{flag}: expected shapes that torchao takes, got {got}; choose another")


def count_stored_bytes(tensor: torch.Tensor) -> int:
    """Count what a weight is stored in; of torchao's, all its parts."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(count_stored_bytes(getattr(tensor, name)) for name in flatten()[0])


def _configure(weights: str, device: str, width: int) -> Any:
    """Make torchao's configuration for a matrix with rows of `width`. Raises DiffusionError: it has none for them."""
    from torchao import quantization as ao

    if weights == "int8":
        return ao.Int8WeightOnlyConfig()
    if weights == "fp8":
        if device == "cpu":
            return ao.Float8WeightOnlyConfig()
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    group = next((group for group in INT4_GROUPS[device == "cpu"] if width % group == 0), None)
    if group is None:
        expected = f"expected rows of a multiple of {INT4_GROUPS[device == 'cpu'][-1]} weights"
        raise DiffusionError(f"--draft-weights int4: {expected}, got {width}; choose another")
    if device == "cpu":
        four_bits = torch.int4  # type: ignore[attr-defined]
        return ao.IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=ao.PerGroup(group))
    return ao.Int4WeightOnlyConfig(group_size=group)
