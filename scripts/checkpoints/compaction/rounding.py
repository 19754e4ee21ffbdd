"""What is lost where plain experts are rounded to FP8: with a scale per atom, and with the releases' 128×128 blocks."""

from __future__ import annotations

import msgspec
import torch

from laguna_serve.plugins.formats.fp8 import dequantise_atoms, quantise_atoms, quantise_blocks
from laguna_serve.scripts.checkpoints.compaction.base import read_experts
from laguna_serve.scripts.checkpoints.compaction.shards import SCALE_DTYPE, TORCH_DTYPES, Compaction
from laguna_serve.serving.kit.signals import check_signals

# Of a layer's experts, evenly spread: the error is one of millions of values all the same.
MOST_EXPERTS = 16


class Rounding(msgspec.Struct, frozen=True, kw_only=True):
    """Root mean square of the error, over that of the weights, in the kept atoms of `experts` of `all_experts`."""

    atoms: float
    blocks: float
    experts: int
    all_experts: int


def measure_rounding(job: Compaction) -> Rounding:
    """Read some experts of every sparse layer and round them in both ways."""
    shape, dtype = job.base.shape, TORCH_DTYPES[SCALE_DTYPE]
    step = -(-shape.num_experts // MOST_EXPERTS)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    for layer, number in enumerate(shape.layers):
        for expert, gate, up, down in read_experts(job.base.folder, job.base, number):
            if expert % step:
                continue
            atoms = torch.from_numpy(job.pruning.atoms(layer, expert)).flatten()
            for matrix in (gate, up, down.t()):
                squares += _measure(matrix.values, atoms, dtype)
            count += 1
        check_signals()
    by_atom, by_block = ((squares[:2] / squares[2].clamp_min(1e-300)).sqrt()).tolist()
    every = shape.num_experts * len(shape.layers)
    return Rounding(atoms=by_atom, blocks=by_block, experts=count, all_experts=every)


def _measure(values: torch.Tensor, atoms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Squared errors by atom and by block, and squared weights, of the kept rows of [N, H]."""
    kept = values[atoms].float()
    rounded, blocks = quantise_atoms(kept, dtype), quantise_blocks(values.nan_to_num(0.0, 0.0, 0.0), dtype)
    errors = (dequantise_atoms(rounded.values, rounded.require_scale()) - kept, blocks.float()[atoms] - kept)
    return torch.stack([part.double().square().sum() for part in (*errors, kept)])


def format_rounding(rounding: Rounding) -> str:
    """Write a line for people."""
    errors = f"{rounding.atoms:.3%} of the weights (RMS) with a scale per atom, {rounding.blocks:.3%} by 128×128 blocks"
    return f"{errors}; {rounding.experts:,} of {rounding.all_experts:,} experts"
