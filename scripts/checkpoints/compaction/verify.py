"""Does what was written compute what the masked base computes? Read back from the files and compared, layer by layer.

The truth is worked out without the blocks: every expert of the base in full, in fp32, dequantised where it is FP8, with
the activations of pruned atoms set to zero. Against it stand the blocks on disk, through the kernel's reference, or
the zeroed matrices on disk. Of a base that is rounded to FP8 the truth is the matrices so rounded, atom by atom.
Everything that pruning does not touch must be identical to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from laguna_serve.kernels.sentinel_moe import sentinel_moe_reference
from laguna_serve.plugins.formats.fp8 import Matrix, dequantise_atoms, quantise_atoms
from laguna_serve.scripts.checkpoints.compaction.base import read_experts
from laguna_serve.scripts.checkpoints.compaction.shards import (
    SCALE_DTYPE,
    TORCH_DTYPES,
    Compaction,
    Shard,
    block_names,
    block_shapes,
    list_inputs,
)
from laguna_serve.scripts.checkpoints.headers import is_identical, open_file, open_files
from laguna_serve.serving.checkpoint import CheckpointError

# Both sides multiply the same numbers in fp32 and add them up in another order: some 1e-6 of the largest output.
TOLERANCE = 1e-5
ROUNDS = 2
TOP_K = 8


class DifferenceError(CheckpointError):
    """What is on disk is not what the base and the mask make, as one line."""


def verify(job: Compaction, shards: list[Shard], out: Path, say: Callable[[str], None]) -> list[float]:
    """Verify each sparse layer's routed output: its largest error, relative to its largest value.

    Raises:
        DifferenceError: a tensor is missing or of another shape, or one that is only passed on has changed.
    """
    where = {name: shard.name for shard in shards for name in _names(job, shard)}
    with open_files(out, (shard.name for shard in shards)) as made:
        _check_names(made, where, out)
    for shard in shards:
        with open_files(job.base.folder, list_inputs(job, shard)) as base, open_file(out / shard.name) as made:
            _compare_passed(job, shard, base, made, out)
    errors = []
    for layer, number in enumerate(job.base.shape.layers):
        errors.append(_compare_layer(job, layer, where, out))
        say(f"layer {number:>3}  largest relative error {errors[-1]:.1e}")
    return errors


def _names(job: Compaction, shard: Shard) -> list[str]:
    return [*shard.passed.values(), *(name for layer in shard.layers for name in block_names(job, layer))]


def _check_names(made: dict[str, Any], where: dict[str, str], out: Path) -> None:
    written = {name: file for file, opened in made.items() for name in opened.keys()}  # noqa: SIM118
    if written != where:
        stray = min(written.items() ^ where.items())[0]
        got = f"{stray} in {written.get(stray, 'no file')}, wanted in {where.get(stray, 'none')}"
        raise DifferenceError(f"{out}: expected the planned tensors, got {got}; remove the folder and make it again")


def _compare_passed(job: Compaction, shard: Shard, base: dict[str, Any], made: Any, out: Path) -> None:
    experts = {name for layer in job.base.shape.layers for name in job.base.expert_names(layer)}
    for name, new in shard.passed.items():
        if name in experts:
            continue
        old, again = base[job.base.tensors[name].file].get_tensor(name), made.get_tensor(new)
        if not is_identical(old, again):
            remedy = "remove the folder and make it again"
            raise DifferenceError(f"{out}: expected {new} as in the base, got other values; {remedy}")


def _compare_layer(job: Compaction, layer: int, where: dict[str, str], out: Path) -> float:
    x, weights, ids = _draw_inputs(job, layer)
    wanted = _run_experts(job, layer, job.base.folder, _keep_atoms(job, layer), x, weights, ids)
    if not torch.isfinite(wanted).all():
        expected = f"finite weights of layer {job.base.shape.layers[layer]}, for something to compare"
        raise DifferenceError(f"{job.base.name}: expected {expected}, got NaN or infinity; repair the base")
    if job.zeroed:
        every = torch.ones(job.base.shape.num_experts, job.base.shape.intermediate_size, dtype=torch.bool)
        got = _run_experts(job, layer, out, every, x, weights, ids)
    else:
        names = block_names(job, layer)
        with open_files(out, (where[name] for name in names)) as made:
            blocks = {name: made[where[name]].get_tensor(name) for name in names}
            _check_blocks(job, layer, blocks, out)
            w13, w2, start, *scales = blocks.values()
            if scales:
                w13, w2 = dequantise_atoms(w13, scales[0]), dequantise_atoms(w2, scales[1])
            got = sentinel_moe_reference(x, weights, ids, w13, w2, start)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _check_blocks(job: Compaction, layer: int, blocks: dict[str, torch.Tensor], out: Path) -> None:
    for name, (dtype, shape) in block_shapes(job, layer).items():
        tensor, stored = blocks[name], torch.int32 if dtype == "I32" else TORCH_DTYPES[dtype]
        if tensor.shape != shape or tensor.dtype != stored:
            expected, got = f"{name} {list(shape)} in {stored}", f"{list(tensor.shape)} in {tensor.dtype}"
            raise DifferenceError(f"{out}: expected {expected}, got {got}; remove the folder")
    name = block_names(job, layer)[2]
    if blocks[name].tolist() != job.pruning.block_start(layer).tolist():
        raise DifferenceError(f"{out}: expected {name} of the mask, got another; remove the folder")


def _draw_inputs(job: Compaction, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens x [T, H], routing weights [T, k] and distinct experts [T, k], every expert being chosen `ROUNDS` times."""
    E, H = job.base.shape.num_experts, job.base.shape.hidden_size
    k = min(int(job.base.config.get("num_experts_per_tok", TOP_K)), E)
    generator = torch.Generator().manual_seed(layer)
    rows = []
    for _ in range(ROUNDS):
        order = torch.randperm(E, generator=generator)
        rows += [order.roll(-first)[:k] for first in range(0, E, k)]
    ids = torch.stack(rows)
    x = torch.randn(len(ids), H, generator=generator)
    weights = torch.rand(ids.shape, generator=generator) + 0.1
    return x, weights / weights.sum(-1, keepdim=True), ids.int()


def _keep_atoms(job: Compaction, layer: int) -> torch.Tensor:
    """[E, N] bool: whether an atom stays."""
    kept = torch.zeros(job.base.shape.num_experts, job.base.shape.intermediate_size, dtype=torch.bool)
    for expert, atoms in enumerate(job.pruning.indices[layer]):
        kept[expert, torch.from_numpy(atoms[job.pruning.keep[layer, expert]]).flatten()] = True
    return kept


def _run_experts(
    job: Compaction,
    layer: int,
    folder: Path,
    kept: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Σ over a token's experts of weight · expert(x) in fp32, from matrices in the base's layout; kept [E, N] bool.

    Atoms that go are left out before anything is computed: NaN times zero is NaN.
    """
    out = torch.zeros_like(x)
    for expert, *matrices in read_experts(folder, job.base, job.base.shape.layers[layer]):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        stays = kept[expert]
        rows_of_atoms = (matrices[0], matrices[1], matrices[2].t())
        gate, up, down = (_round(m, stays) if job.rounds else m.float()[stays] for m in rows_of_atoms)
        hidden = F.silu(x[rows] @ gate.t()) * (x[rows] @ up.t())
        out.index_add_(0, rows, (hidden @ down) * weights[rows, slots, None])
    return out


def _round(matrix: Matrix, stays: torch.Tensor) -> torch.Tensor:
    """Rows of the atoms of [N, H] that stay as they are in FP8, in fp32."""
    rounded = quantise_atoms(matrix.values[stays], TORCH_DTYPES[SCALE_DTYPE])
    return dequantise_atoms(rounded.values, rounded.require_scale())
