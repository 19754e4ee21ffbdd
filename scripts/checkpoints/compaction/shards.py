"""Which files the output has, and the tensors of each, built from the mapped base.

A compact checkpoint of a sharded base has one file per sparse layer's experts, and one for what else an input file
holds; of a single-file base it has a single file. The zeroed form mirrors the base file by file.

Blocks in FP8 have their atoms' scales beside them: w13_scales [n, 2, B, G] and w2_scales [n, B, G], G = ⌈hidden / 128⌉,
in the dtype of the base's scales, or in bf16 where the base is rounded to FP8.

Memory: blocks are gathered from a few experts' mapped pages at a time, and safetensors writes from the tensors' own
memory, so that little more than the output file is resident.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from laguna_serve.plugins.formats.experts import FP8
from laguna_serve.plugins.formats.fp8 import Matrix, NotFiniteError, count_blocks, quantise_atoms
from laguna_serve.plugins.pruning import Pruning
from laguna_serve.scripts.checkpoints.compaction.base import Base, Expert, read_experts
from laguna_serve.scripts.checkpoints.headers import ITEM_BYTES, open_files
from laguna_serve.serving.checkpoint import CheckpointError

Advance = Callable[[int], None]
# transformers' own names → those of the published checkpoints, for a base in its fused spelling.
RENAMED = (
    (re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.experts.e_score_correction_bias"),
    (re.compile(r"\.mlp\.shared_experts\."), ".mlp.shared_expert."),
)
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
# Of scales where the base has none.
SCALE_DTYPE = "BF16"


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
    """What is made of a base.

    Attributes:
        zeroed: in the base's own layout, with the pruned atoms at zero.
        format: of the blocks, PLAIN or FP8; the base's own, unless it is to be rounded.
    """

    base: Base
    pruning: Pruning
    zeroed: bool
    format: str

    @property
    def rounds(self) -> bool:
        """Plain weights become FP8, the one way in which values change."""
        return self.format == FP8 != self.base.format

    @property
    def dtypes(self) -> tuple[str, str | None]:
        """Return the dtypes of blocks and of their scales, None without any, in safetensors' spelling."""
        if self.format != FP8:
            return self.base.dtype, None
        return "F8_E4M3", self.base.scale_dtype or SCALE_DTYPE


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


def block_names(job: Compaction, layer: int) -> tuple[str, ...]:
    """Name the compact tensors of a sparse layer.

    Gate and up blocks, down blocks, where each expert's start; of FP8 then the scales of the first two.
    """
    prefix = f"model.layers.{job.base.shape.layers[layer]}.mlp.experts"
    scales = ("w13_scales", "w2_scales") if job.format == FP8 else ()
    return tuple(f"{prefix}.{name}" for name in ("w13_blocks", "w2_blocks", "block_start", *scales))


def block_shapes(job: Compaction, layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Compact tensor of a sparse layer → its dtype in safetensors' spelling, and its shape."""
    n, B, H = job.pruning.kept_blocks[layer], job.pruning.block_size, job.base.shape.hidden_size
    dtype, scale_dtype = job.dtypes
    w13, w2, start, *scales = block_names(job, layer)
    shapes = {w13: (dtype, (n, 2, B, H)), w2: (dtype, (n, B, H)), start: ("I32", (job.base.shape.num_experts + 1,))}
    if scale_dtype is None:
        return shapes
    G = count_blocks(H)
    return shapes | dict(zip(scales, ((scale_dtype, (n, 2, B, G)), (scale_dtype, (n, B, G))), strict=True))


def tensor_bytes(job: Compaction, shard: Shard) -> dict[str, int]:
    """Output tensor → its bytes."""
    sizes = {out: job.base.tensors[name].num_bytes for name, out in shard.passed.items()}
    for layer in shard.layers:
        shapes = block_shapes(job, layer)
        sizes |= {name: math.prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in shapes.items()}
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
    base, start = job.base, job.pruning.block_start(layer)
    w13, w2, start_name, *scales = block_names(job, layer)
    tensors = {
        name: torch.from_numpy(start) if name == start_name else torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        for name, (dtype, shape) in block_shapes(job, layer).items()
    }
    for expert in read_experts(base.folder, base, base.shape.layers[layer]):
        place = slice(int(start[expert[0]]), int(start[expert[0] + 1]))
        parts = gather_blocks(job, layer, expert)
        advance(sum(part.values.nbytes + (0 if part.scale is None else part.scale.nbytes) for part in parts))
        tensors[w13][place, 0], tensors[w13][place, 1], tensors[w2][place] = (part.values for part in parts)
        if scales:
            w13_scales, w2_scales = (tensors[name] for name in scales)
            gate_scale, up_scale, down_scale = (part.require_scale() for part in parts)
            w13_scales[place, 0], w13_scales[place, 1], w2_scales[place] = gate_scale, up_scale, down_scale
    return tensors


def gather_blocks(job: Compaction, layer: int, expert: Expert) -> tuple[Matrix, Matrix, Matrix]:
    """One expert's kept atoms as they are stored: gate, up and down [n, B, H], of FP8 with scales [n, B, G]."""
    number, gate, up, down = expert
    atoms = torch.from_numpy(job.pruning.atoms(layer, number))
    parts = (gate.gather(atoms), up.gather(atoms), down.t().gather(atoms))
    if not job.rounds:
        return parts
    dtype = TORCH_DTYPES[SCALE_DTYPE]
    try:
        gate, up, down = (quantise_atoms(part.values, dtype) for part in parts)
    except NotFiniteError as error:
        where = f"layer {job.base.shape.layers[layer]}, expert {number}"
        raise CheckpointError(f"{job.base.name}: {where}: {error}") from None
    return gate, up, down
