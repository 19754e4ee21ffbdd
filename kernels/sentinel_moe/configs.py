"""The tiles of the Triton kernels: one table, by the kind of path and of weights.

A path's tiles never depend on the number of tokens: with the order of sums in experts.py that is what makes a row's
bits independent of its batch. The rows below were chosen from what the compiler makes of them, on no GPU: no spills
from sm_80 to sm_120, at least 256 programs for one token of XS.2 (two a multiprocessor), 33 KiB of weights on their
way per multiprocessor of an H200 (4.3 TB/s × 1 µs ÷ 132), and shared-memory traffic per byte of weights that leaves
the memory as the limit. `python bench/moe_tuning` measures a device and writes its rows (tables.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Path = Literal["decode", "prefill"]
Weights = Literal["16-bit", "fp8", "fp32"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shapes of one path's programs.

    Attributes:
        members: pairs of one expert that share a tile.
        block_a: atoms of a `gate_up` program, times two for gate and up.
        block_h: hidden elements of a step of its loop; at most 128 with 8-bit weights, whose scales are of 128.
        block_n: output columns of a `down` program, likewise at most 128.
        block_k: atoms of a step of its loop.
        parts: of an expert's blocks, each summed by a program of its own.
        warps, stages: of `gate_up` and of `down`.
    """

    members: int
    block_a: int
    block_h: int
    block_n: int
    block_k: int
    parts: int
    warps: tuple[int, int]
    stages: tuple[int, int]


TABLE: dict[tuple[Path, Weights], Tiles] = {
    ("decode", "16-bit"): Tiles(8, 16, 128, 64, 64, 1, (2, 2), (4, 4)),
    ("decode", "fp8"): Tiles(8, 16, 128, 128, 64, 2, (2, 2), (5, 4)),
    ("decode", "fp32"): Tiles(8, 16, 64, 64, 32, 1, (4, 4), (3, 3)),
    ("prefill", "16-bit"): Tiles(64, 64, 64, 128, 64, 1, (4, 4), (3, 3)),
    ("prefill", "fp8"): Tiles(64, 64, 64, 128, 64, 1, (8, 8), (3, 3)),
    ("prefill", "fp32"): Tiles(32, 16, 32, 64, 32, 1, (4, 4), (3, 3)),
}


def kind_of_weights(activations: torch.dtype, weights: torch.dtype) -> Weights:
    """Which rows of the table serve these dtypes."""
    if weights.itemsize == 1:
        return "fp8"
    return "fp32" if activations == torch.float32 else "16-bit"
