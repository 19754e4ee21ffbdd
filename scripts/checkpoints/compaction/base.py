"""The checkpoint that is made smaller: its headers, checked before anything is written, and its tensors, mapped.

Two spellings of the routed experts are read: one matrix per expert, as Laguna is published and as transformers saves
it, and transformers' fused one (`save_original_format=False`), where the experts of a layer are two tensors. In FP8
there is the first alone, and beside every matrix its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.plugins.formats.experts import FP8, PLAIN, read_base_format
from laguna_serve.plugins.formats.fp8 import Matrix, count_blocks
from laguna_serve.plugins.pruning import ExpertShape, read_shape
from laguna_serve.scripts.checkpoints.headers import (
    FP8_DTYPE,
    INDEX,
    ITEM_BYTES,
    SCALE_SUFFIXES,
    Entry,
    open_files,
    read_headers,
    require_block_scales,
)
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, read_config
from laguna_serve.serving.kit.results import JsonObject

PLAIN_DTYPES = ("BF16", "F16", "F32")
SCALE_DTYPES = ("BF16", "F32")
SCALE = "_scale"  # after the name of the matrix
QUANTISED = re.compile(r"(_scale|_scale_2|_scale_inv|_zero_point|_zeros|_packed|qweight|qzeros|g_idx|scales)$")
EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(.+)")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# A layer's files are mapped anew so many times: pages that were read stay resident as long as the mapping lives.
OPENINGS = 16
BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A checked Laguna checkpoint.

    Attributes:
        format: how its routed experts are stored, PLAIN or FP8.
        fused: their spelling.
        sharded: there is an index.
    """

    folder: Path
    name: str
    config: ConfigJson
    shape: ExpertShape
    tensors: dict[str, Entry]
    format: str
    fused: bool
    sharded: bool
    fingerprint: str

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.tensors.values()})

    @property
    def dtype(self) -> str:
        """That of the experts, in safetensors' spelling."""
        return self.tensors[self.expert_names(self.shape.layers[0])[0]].dtype

    @property
    def scale_dtype(self) -> str | None:
        """That of the experts' scales, in FP8."""
        if self.format != FP8:
            return None
        return self.tensors[self.expert_names(self.shape.layers[0])[0] + SCALE].dtype

    def expert_names(self, layer: int) -> list[str]:
        """List the tensors that hold a sparse layer's routed experts, and in FP8 their scales."""
        return list(expert_shapes(self.shape, layer, self.fused, self.format))


def expert_shapes(shape: ExpertShape, layer: int, fused: bool, stored: str = PLAIN) -> dict[str, tuple[int, ...]]:
    """Name → shape of what must hold a sparse layer's experts."""
    E, N, H = shape.num_experts, shape.intermediate_size, shape.hidden_size
    prefix = f"model.layers.{layer}.mlp.experts"
    if fused:
        return {f"{prefix}.gate_up_proj": (E, 2 * N, H), f"{prefix}.down_proj": (E, H, N)}
    sizes = ((N, H), (N, H), (H, N))
    named = [(f"{name}.weight", size) for name, size in zip(PROJECTIONS, sizes, strict=True)]
    if stored == FP8:
        named += [(name + SCALE, (count_blocks(rows), count_blocks(columns))) for name, (rows, columns) in named]
    return {f"{prefix}.{expert}.{name}": size for expert in range(E) for name, size in named}


def read_base(folder: Path, name: str) -> Base:
    """Read every header and check it.

    Raises:
        CheckpointError, ExpertFormatError, PruningError: naming what is wrong.
    """
    config = read_config(folder)
    stored = check_config(config, name)
    shape = read_shape(config, name)
    sharded = (folder / INDEX).is_file()
    tensors, fingerprint = read_headers(folder, name)
    fused = any(re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj", key) for key in tensors)
    base = Base(folder, name, config, shape, tensors, stored, fused and stored == PLAIN, sharded, fingerprint)
    _check_dtypes(base)
    _check_experts(base)
    require_block_scales(tensors, name)
    return base


def check_config(config: ConfigJson, name: str) -> str:
    """Return how the experts are stored; refuse a config whose experts cannot be cut, or are already pruned.

    Raises:
        CheckpointError, ExpertFormatError: naming what is wrong.
    """
    stored = read_base_format(config, name)
    if config.get("expert_pruning"):
        raise CheckpointError(
            f"{name}: expected a base checkpoint, got one with expert_pruning; pass what it was made from"
        )
    return stored


def _check_dtypes(base: Base) -> None:
    """Scales and FP8 where the config says that there are some; nothing else that is quantised."""
    quantised = bool(base.config.get("quantization_config") or base.config.get("compression_config"))
    expected = "unquantised weights, or FP8 ones as config.json says" if quantised else "unquantised weights"
    remedy = "pass the bf16, fp16 or fp32 release, or the FP8 one with its own config.json"
    for name, entry in base.tensors.items():
        if QUANTISED.search(name) and not (quantised and name.endswith(SCALE_SUFFIXES)):
            raise CheckpointError(f"{base.name}: expected {expected}, got {name}; {remedy}")
        if entry.dtype not in ITEM_BYTES or (entry.dtype == FP8_DTYPE and not quantised):
            raise CheckpointError(f"{base.name}: expected {expected}, got {name} in {entry.dtype}; {remedy}")


def _check_experts(base: Base) -> None:
    wanted: set[str] = set()
    allowed = {False: (FP8_DTYPE,) if base.format == FP8 else PLAIN_DTYPES, True: SCALE_DTYPES}
    for layer in base.shape.layers:
        for name, expected in expert_shapes(base.shape, layer, base.fused, base.format).items():
            wanted.add(name)
            entry, is_scale = base.tensors.get(name), name.endswith(SCALE)
            if entry is None:
                raise CheckpointError(f"{base.name}: expected tensor {name}, got none; is the download complete?")
            if entry.shape != expected:
                got = list(entry.shape)
                raise CheckpointError(
                    f"{base.name}: expected {name} {list(expected)}, got {got}; does config.json fit?"
                )
            if entry.dtype not in allowed[is_scale]:
                wanted_dtype = f"{name} in {' or '.join(allowed[is_scale])}"
                raise CheckpointError(f"{base.name}: expected {wanted_dtype}, got {entry.dtype}; convert it first")
            allowed[is_scale] = (entry.dtype,)  # of all the others, too
    strays = [
        name for name in base.tensors if (match := EXPERTS.fullmatch(name)) and match[2] != BIAS and name not in wanted
    ]
    if strays:
        known = "one matrix per expert, or gate_up_proj and down_proj"
        raise CheckpointError(f"{base.name}: expected experts as {known}, got {min(strays)} too; does config.json fit?")


Expert = tuple[int, Matrix, Matrix, Matrix]


def read_experts(folder: Path, base: Base, layer: int) -> Iterator[Expert]:
    """Read each of a layer's experts, from the base or a folder like it: number, gate and up [N, H], down [H, N].

    The matrices are views that live until the next expert is asked for.
    """
    inputs = {base.tensors[name].file for name in base.expert_names(layer)}
    E = base.shape.num_experts
    step = max(1, E // OPENINGS)
    for first in range(0, E, step):
        with open_files(folder, inputs) as files:
            for expert in range(first, min(first + step, E)):
                yield expert, *_read_expert(files, base, layer, expert)


def _read_expert(files: JsonObject, base: Base, layer: int, expert: int) -> tuple[Matrix, Matrix, Matrix]:
    prefix = f"model.layers.{layer}.mlp.experts"
    if base.fused:
        gate_up, down = (
            files[base.tensors[f"{prefix}.{name}"].file].get_slice(f"{prefix}.{name}")[expert]
            for name in ("gate_up_proj", "down_proj")
        )
        gate, up = gate_up.chunk(2)
        return Matrix(gate), Matrix(up), Matrix(down)

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = files[base.tensors[name].file].get_tensor(name)
        return tensor

    names = [f"{prefix}.{expert}.{name}.weight" for name in PROJECTIONS]
    gate, up, down = (Matrix(read(name), read(name + SCALE) if base.format == FP8 else None) for name in names)
    return gate, up, down
