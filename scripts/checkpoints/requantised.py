"""Change the numbers that a Laguna is stored in: plain ones to FP8 as the releases have it, or FP8 to plain ones.

The layout is that of Laguna-XS.2-FP8 (tests/fixtures/releases): compressed-tensors' `float-quantized`, 128×128 blocks,
`weight` in e4m3 with `weight_scale` in bf16, in the feed-forward layers alone; attention, router, embedding and head
stay as they are, and a scale each for keys and values asks for an FP8 KV cache. The releases rotate the residual
stream first (`transform_config`), which is stored in the weights and no work at run time; here nothing is rotated.

Files, their metadata and the order of the tensors are kept, and written one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.plugins.formats.experts import FP8, PLAIN, read_base_format
from laguna_serve.plugins.formats.fp8 import NotFiniteError, count_blocks, dequantise_blocks, quantise_blocks
from laguna_serve.scripts.checkpoints.headers import FP8_DTYPE, Entry, open_files, read_headers, require_block_scales
from laguna_serve.scripts.checkpoints.mirrored import MirroredSource, Planned
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, read_config
from laguna_serve.serving.checkpoint.quantisation import find_rotation
from laguna_serve.serving.kit.results import JsonObject

# Transformers' spelling of a layer's experts, of which MATRIX knows none.
FUSED = re.compile(r"\.mlp\.experts\.(?:gate_up_proj|down_proj)$")
MATRIX = re.compile(r"model\.layers\.\d+\.mlp\.(?:.+\.)?(?:gate|up|down)_proj\.weight")
KEYS = re.compile(r"(model\.layers\.\d+\.self_attn\.)k_proj\.weight")
SCALE, KV_SCALES = "_scale", ("k_scale", "v_scale")
DTYPES = {"bf16": ("BF16", "bfloat16", torch.bfloat16), "fp32": ("F32", "float32", torch.float32)}
QUANTISATION_KEYS = ("quantization_config", "compression_config")
PLAIN_DTYPES = ("BF16", "F16", "F32")
_ARGUMENTS: JsonObject = {
    "actorder": None,
    "group_size": None,
    "num_bits": 8,
    "observer_kwargs": {},
    "scale_dtype": None,
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}
BLOCKS = [128, 128]
QUANTISATION: JsonObject = {
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "input_activations": _ARGUMENTS
            | {"block_structure": None, "dynamic": True, "group_size": 128, "observer": None, "strategy": "group"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": _ARGUMENTS
            | {"block_structure": BLOCKS, "dynamic": False, "observer": "memoryless_minmax", "strategy": "block"},
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": None,
    "ignore": [
        "lm_head",
        *(f"re:.*\\.self_attn\\.{name}_proj$" for name in "qkvog"),
        "re:.*\\.mlp\\.gate$",
    ],
    "kv_cache_scheme": _ARGUMENTS
    | {"block_structure": None, "dynamic": False, "observer": "minmax", "strategy": "tensor"},
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.14.1",
}


@dataclass(frozen=True, slots=True, eq=False)
class NumbersSource(MirroredSource):
    """A checked checkpoint and the numbers that are wanted of it: "fp8", "bf16" or "fp32"."""

    to: str

    def plan(self, file: str) -> Planned:
        """Plan the tensors of an output file."""
        planned: Planned = {}
        for name, entry in self.tensors.items():
            if entry.file != file or (self.to != FP8 and name.endswith(SCALE)):
                continue
            if self.to != FP8:
                planned[name] = (DTYPES[self.to][0] if self.changes(name) else entry.dtype, entry.shape)
                continue
            if match := KEYS.fullmatch(name):
                planned |= {match[1] + scale: ("BF16", (1,)) for scale in KV_SCALES}
            if MATRIX.fullmatch(name):
                rows, columns = entry.shape
                planned[name + SCALE] = ("BF16", (count_blocks(rows), count_blocks(columns)))
            planned[name] = ("F8_E4M3" if MATRIX.fullmatch(name) else entry.dtype, entry.shape)
        return planned

    def changes(self, name: str) -> bool:
        """Whether a tensor's numbers become plain ones; fp32 stays, as the releases have their routers' biases."""
        return self.tensors[name].dtype in (FP8_DTYPE, "BF16", "F16")

    def make(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make what stands in the output for one of its tensors."""
        return _quantise(name, tensor) if self.to == FP8 else _dequantise(self, name)

    def describe(self) -> ConfigJson:
        """Describe the output's numbers in its config.json."""
        config = {key: value for key, value in self.config.items() if key not in QUANTISATION_KEYS}
        if self.to == FP8:
            return {**config, "quantization_config": QUANTISATION}
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        if (rotation := find_rotation(self.config)) is not None:  # the weights keep it, and a drafter must know
            config["transform_config"] = rotation
        return {**config, **dict.fromkeys(keys, DTYPES[self.to][1])}


def read_numbers(folder: Path, name: str, to: str) -> NumbersSource:
    """Read a checkpoint whose numbers can be changed so.

    Raises:
        CheckpointError, ExpertFormatError: it has them already, or other ones than plain and FP8.
    """
    config = read_config(folder)
    if config.get("expert_pruning") or config.get("intermediate_size_per_layer"):
        remedy = "change the numbers first, and cut then"
        raise CheckpointError(f"{name}: expected a checkpoint in stock layout, got one that was cut; {remedy}")
    stored = read_base_format(config, name)
    tensors, fingerprint = read_headers(folder, name)
    quantised = stored == FP8 or any(entry.dtype == FP8_DTYPE for entry in tensors.values())
    if quantised == (to == FP8):
        wanted = PLAIN if to == FP8 else FP8
        raise CheckpointError(f"{name}: expected {wanted} weights for --to {to}, got others; there is nothing to do")
    if to == FP8:
        _require_matrices(tensors, name)
    require_block_scales(tensors, name)
    return NumbersSource(folder, config, tensors, fingerprint, to)


def _require_matrices(tensors: Mapping[str, Entry], name: str) -> None:
    """Check that what is to become FP8 is a plain matrix each, under its published name. Raises CheckpointError."""
    if fused := next(filter(FUSED.search, tensors), None):
        remedy = "save it again by transformers' save_pretrained, without save_original_format=False"
        raise CheckpointError(f"{name}: expected a matrix for each expert, got all of a layer's in {fused}; {remedy}")
    matrices = {key: entry for key, entry in tensors.items() if MATRIX.fullmatch(key)}
    for key, entry in matrices.items():
        if entry.dtype not in PLAIN_DTYPES or len(entry.shape) != 2:
            raise CheckpointError(f"{name}: expected plain matrices, got {key} in {entry.dtype}; fetch it again")
    if not matrices:
        raise CheckpointError(f"{name}: expected feed-forward layers with a matrix each, got none; use published names")


def _quantise(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if match := KEYS.fullmatch(name):
        scale = torch.ones(1, dtype=torch.bfloat16)
        return {name: tensor, **{match[1] + part: scale.clone() for part in KV_SCALES}}
    if not MATRIX.fullmatch(name):
        return {name: tensor}
    try:
        matrix = quantise_blocks(tensor)
    except NotFiniteError as error:
        raise CheckpointError(f"{name}: {error}") from None
    return {name: matrix.values, name + SCALE: matrix.require_scale()}


def _dequantise(source: NumbersSource, name: str) -> dict[str, torch.Tensor]:
    """One tensor in plain numbers; nothing of a scale, which may lie in another file than its matrix."""
    if name.endswith(SCALE):
        return {}
    dtype = DTYPES[source.to][2]
    names = [name, name + SCALE] if name + SCALE in source.tensors else [name]
    with open_files(source.folder, (source.tensors[key].file for key in names)) as files:
        tensor, *scale = (files[source.tensors[key].file].get_tensor(key) for key in names)
        plain = dequantise_blocks(tensor, scale[0]) if scale else tensor
        return {name: plain.to(dtype) if source.changes(name) else plain}
