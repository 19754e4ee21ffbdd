"""Which files the output has, and the tensors of each, built from the mapped base.

A compact checkpoint of a sharded base has one file per sparse layer's experts, and one for what else an input file
holds; of a single-file base it has a single file.  The zeroed form mirrors the base file by file.

Memory: blocks are gathered from a few experts' mapped pages at a time, and safetensors writes from the tensors' own
memory, so that little more than the output file is resident.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from laguna_serve.plugins.pruning import Pruning, gather_blocks
from laguna_serve.scripts.checkpoints.compaction.base import Base, read_experts
from laguna_serve.scripts.checkpoints.headers import ITEM_BYTES, open_files

Advance = Callable[[int], None]
# transformers' own names → those of the published checkpoints, for a base in its fused spelling.
RENAMED = (
    (re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.experts.e_score_correction_bias"),
    (re.compile(r"\.mlp\.shared_experts\."), ".mlp.shared_expert."),
)
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    The sparse layers (counted among the sparse ones) whose blocks it holds, and tensors passed on (name in the base →
    name in the output).
    """

    name: str
    layers: tuple[int, ...]
    passed: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Compaction:
    """What is made of a base.  `zeroed` asks for the base's own layout with the pruned atoms set to zero."""

    base: Base
    pruning: Pruning
    zeroed: bool


def plan_shards(job: Compaction) -> list[Shard]:
    """Plan the output files, in the order in which they are written."""
    base = job.base
    if job.zeroed:
        return [Shard(file, (), {n: n for n, e in base.tensors.items() if e.file == file}) for file in base.files]
    experts = {name for layer in base.shape.layers for name in base.expert_names(layer)}
    passed = {name: publish_name(name) for name in sorted(base.tensors) if name not in experts}
    if not base.sharded:
        return [Shard("model.safetensors", tuple(range(len(base.shape.layers))), passed)]
    parts: list[tuple[tuple[int, ...], dict[str, str]]] = []
    for file in base.files:
        rest = {name: out for name, out in passed.items() if base.tensors[name].file == file}
        if rest:
            parts.append(((), rest))
    parts += [((layer,), {}) for layer in range(len(base.shape.layers))]
    return [Shard(f"model-{i:05}-of-{len(parts):05}.safetensors", *part) for i, part in enumerate(parts, 1)]


def publish_name(name: str) -> str:
    """Name a tensor that is passed on as published checkpoints do."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def block_names(job: Compaction, layer: int) -> tuple[str, str, str]:
    """Name the compact tensors of a sparse layer: gate and up blocks, down blocks, where each expert's start."""
    prefix = f"model.layers.{job.base.shape.layers[layer]}.mlp.experts"
    return f"{prefix}.w13_blocks", f"{prefix}.w2_blocks", f"{prefix}.block_start"


def tensor_bytes(job: Compaction, shard: Shard) -> dict[str, int]:
    """Output tensor → its bytes."""
    sizes = {out: job.base.tensors[name].num_bytes for name, out in shard.passed.items()}
    row_bytes = job.base.shape.hidden_size * ITEM_BYTES[job.base.dtype]
    for layer in shard.layers:
        w13, w2, start = block_names(job, layer)
        rows = job.pruning.kept_blocks[layer] * job.pruning.block_size
        sizes |= {w13: 2 * rows * row_bytes, w2: rows * row_bytes, start: 4 * (job.base.shape.num_experts + 1)}
    return sizes


@contextmanager
def build_tensors(job: Compaction, shard: Shard, advance: Advance) -> Iterator[dict[str, torch.Tensor]]:
    """Build the shard's tensors, which live as long as the context; `advance` gets the bytes of each as it is built."""
    with open_files(job.base.folder, (job.base.tensors[name].file for name in shard.passed)) as files:
        tensors: dict[str, torch.Tensor] = {}
        for name, out in shard.passed.items():
            tensors[out] = files[job.base.tensors[name].file].get_tensor(name)
            advance(job.base.tensors[name].num_bytes)
        for layer in shard.layers:
            tensors |= _build_layer(job, layer, advance)
        yield tensors
        tensors.clear()


def list_inputs(job: Compaction, shard: Shard) -> list[str]:
    """List the base's files that a shard is made from."""
    base = job.base
    names = [*shard.passed, *(n for layer in shard.layers for n in base.expert_names(base.shape.layers[layer]))]
    return sorted({base.tensors[name].file for name in names})


def _build_layer(job: Compaction, layer: int, advance: Advance) -> dict[str, torch.Tensor]:
    base, pruning = job.base, job.pruning
    start = pruning.block_start(layer)
    n, B, H = int(start[-1]), pruning.block_size, base.shape.hidden_size
    dtype = TORCH_DTYPES[base.dtype]
    w13, w2 = torch.empty(n, 2, B, H, dtype=dtype), torch.empty(n, B, H, dtype=dtype)
    for expert, gate, up, down in read_experts(base.folder, base, base.shape.layers[layer]):
        place = slice(int(start[expert]), int(start[expert + 1]))
        w13[place], w2[place] = gather_blocks(gate, up, down, torch.from_numpy(pruning.atoms(layer, expert)))
        advance((place.stop - place.start) * 3 * B * H * dtype.itemsize)
    return dict(zip(block_names(job, layer), (w13, w2, torch.from_numpy(start)), strict=True))
