"""A DFlash drafter's context on a CPU: written by whatever the drafter has, and the arithmetic around its products.

The arithmetic is compiled, for drafters that kernels/dflash_context does not serve. It is in float32, whatever the
drafter computes in, and rounded once by who calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.plugins.drafting.compiled import compiled

Floats = npt.NDArray[np.float32]


def store_taps(model: Any, taps: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
    """Write a drafter's keys and values of the target's taps side by side [T, taps · hidden] to slots [T].

    model: the drafter's, as vLLM holds it; other classes than this project's (plugins/models/dflash_cpu.py) do it in
    two steps.
    """
    if hasattr(model, "store_taps"):
        model.store_taps(taps, positions, slots)
    else:
        model.precompute_and_store_context_kv(model.combine_hidden_states(taps), positions, slots)


def prepare() -> None:
    """Compile the arithmetic, so that no step waits for it."""
    _normalize.prepare()
    _rotate.prepare()


def normalize_slices(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each of S slices of rows [T, S · D] with its own weights [S, D] float32; a new tensor of x's dtype."""
    rows = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _normalize(rows.numpy(), weights.numpy(), eps)
    return rows.to(x.dtype)


def finish_keys(
    keys: torch.Tensor, weights: torch.Tensor, eps: float, angles: torch.Tensor, *, neox: bool
) -> torch.Tensor:
    """RMSNorm of keys with their layer's weights, and their rotation; a new contiguous tensor of their dtype.

    Args:
        keys: [L, T, kv_heads, head_dim].
        weights: [L, head_dim] float32.
        eps: of the norm.
        angles: [T, rotated], the cosines of each row's position and then the sines; dimensions behind `rotated` stay.
        neox: whether a dimension is rotated with the one half of `rotated` further, or else with its neighbour.
    """
    rows = keys.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for layer, weight in zip(rows.numpy(), weights.numpy(), strict=True):
        _normalize(layer.reshape(-1, layer.shape[-1]), weight[None], eps)
    _rotate(rows.numpy(), angles.to(torch.float32).contiguous().numpy(), neox)
    return rows.to(keys.dtype)


@compiled("float32[:, ::1]", "float32[:, ::1]", "float64")
def _normalize(rows: Floats, weights: Floats, eps: float) -> None:
    count, size = weights.shape
    for row in range(rows.shape[0]):
        for each in range(count):
            x, weight = rows[row, each * size : (each + 1) * size], weights[each]
            total = np.float32(0)
            for i in range(size):
                total += x[i] * x[i]
            scale = np.float32(1 / np.sqrt(total / size + eps))
            for i in range(size):
                x[i] = x[i] * scale * weight[i]


@compiled("float32[:, :, :, ::1]", "float32[:, ::1]", "boolean")
def _rotate(keys: npt.NDArray[np.float32], angles: Floats, neox: bool) -> None:
    layers, rows, heads, _ = keys.shape
    half = angles.shape[1] // 2
    for layer in range(layers):
        for row in range(rows):
            for head in range(heads):
                x = keys[layer, row, head]
                for i in range(half):
                    a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
                    cosine, sine, first, second = angles[row, i], angles[row, half + i], x[a], x[b]
                    x[a] = first * cosine - second * sine
                    x[b] = second * cosine + first * sine
