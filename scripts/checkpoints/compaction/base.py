"""The checkpoint that is made smaller: its headers, checked before anything is written, and its tensors, mapped.

Two spellings of the routed experts are read: one matrix per expert, as Laguna is published and as transformers saves
it, and transformers' fused one (`save_original_format=False`), where the experts of a layer are two tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.plugins.pruning import ExpertShape, read_shape
from laguna_serve.scripts.checkpoints.headers import (
    INDEX,
    ITEM_BYTES,
    Entry,
    check_unquantised,
    open_files,
    read_headers,
)
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, read_config
from laguna_serve.serving.kit.results import JsonObject

PLAIN = frozenset(("BF16", "F16", "F32"))
QUANTISED = re.compile(r"(_scale|_scale_2|_scale_inv|_zero_point|_zeros|_packed|qweight|qzeros|g_idx|scales)$")
EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(.+)")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# A layer's files are mapped anew so many times: pages that were read stay resident as long as the mapping lives.
OPENINGS = 16
BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A checked Laguna checkpoint.  `fused`: the experts' spelling; `sharded`: whether there is an index."""

    folder: Path
    name: str
    config: ConfigJson
    shape: ExpertShape
    tensors: dict[str, Entry]
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

    def expert_names(self, layer: int) -> list[str]:
        """List the tensors that hold a sparse layer's routed experts."""
        return list(expert_shapes(self.shape, layer, self.fused))


def expert_shapes(shape: ExpertShape, layer: int, fused: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape of what must hold a sparse layer's experts."""
    E, N, H = shape.num_experts, shape.intermediate_size, shape.hidden_size
    prefix = f"model.layers.{layer}.mlp.experts"
    if fused:
        return {f"{prefix}.gate_up_proj": (E, 2 * N, H), f"{prefix}.down_proj": (E, H, N)}
    sizes = ((N, H), (N, H), (H, N))
    named = list(zip(PROJECTIONS, sizes, strict=True))
    return {f"{prefix}.{expert}.{name}.weight": size for expert in range(E) for name, size in named}


def read_base(folder: Path, name: str) -> Base:
    """Read every header and check it.  Raises CheckpointError or PruningError, naming what is wrong."""
    config = read_config(folder)
    check_config(config, name)
    shape = read_shape(config, name)
    sharded = (folder / INDEX).is_file()
    tensors, fingerprint = read_headers(folder, name)
    fused = any(re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj", key) for key in tensors)
    base = Base(folder, name, config, shape, tensors, fused, sharded, fingerprint)
    _check_dtypes(base)
    _check_experts(base)
    return base


def check_config(config: ConfigJson, name: str) -> None:
    """Refuse a config that is quantised or already pruned."""
    check_unquantised(config, name)
    if config.get("expert_pruning"):
        raise CheckpointError(
            f"{name}: expected a base checkpoint, got one with expert_pruning; pass what it was made from"
        )


def _check_dtypes(base: Base) -> None:
    remedy = "pass the unquantised base (bf16, fp16 or fp32)"
    for name, entry in base.tensors.items():
        if QUANTISED.search(name):
            raise CheckpointError(f"{base.name}: expected unquantised weights, got {name}; {remedy}")
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{base.name}: expected unquantised weights, got {name} in {entry.dtype}; {remedy}")


def _check_experts(base: Base) -> None:
    dtype = None
    wanted: set[str] = set()
    for layer in base.shape.layers:
        for name, expected in expert_shapes(base.shape, layer, base.fused).items():
            wanted.add(name)
            entry = base.tensors.get(name)
            if entry is None:
                raise CheckpointError(f"{base.name}: expected tensor {name}, got none; is the download complete?")
            if entry.shape != expected:
                got = list(entry.shape)
                raise CheckpointError(
                    f"{base.name}: expected {name} {list(expected)}, got {got}; does config.json fit?"
                )
            dtype = dtype or entry.dtype
            if entry.dtype not in PLAIN or entry.dtype != dtype:
                expected_dtype = f"{name} in {dtype if dtype in PLAIN else 'BF16, F16 or F32'}"
                raise CheckpointError(f"{base.name}: expected {expected_dtype}, got {entry.dtype}; convert it first")
    strays = [
        name for name in base.tensors if (match := EXPERTS.fullmatch(name)) and match[2] != BIAS and name not in wanted
    ]
    if strays:
        known = "one matrix per expert, or gate_up_proj and down_proj"
        raise CheckpointError(f"{base.name}: expected experts as {known}, got {min(strays)} too; does config.json fit?")


Expert = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]


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


def _read_expert(
    files: JsonObject, base: Base, layer: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prefix = f"model.layers.{layer}.mlp.experts"
    if base.fused:
        gate_up, down = (
            files[base.tensors[f"{prefix}.{name}"].file].get_slice(f"{prefix}.{name}")[expert]
            for name in ("gate_up_proj", "down_proj")
        )
        gate, up = gate_up.chunk(2)
        return gate, up, down
    names = [f"{prefix}.{expert}.{name}.weight" for name in PROJECTIONS]
    gate, up, down = (files[base.tensors[name].file].get_tensor(name) for name in names)
    return gate, up, down
