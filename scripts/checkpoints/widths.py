"""Change the stored width of a dense Laguna's feed-forward layers: cut the padding off, or put it back.

Both ways keep the files, their metadata and the place of every tensor, so that padding what was unpadded gives the
first checkpoint again, bit for bit (but for zeros with a minus sign, which `unpad` counts). What is needed for the way
back stands in the unpadded config.json:

    "architectures": ["LagunaDenseForCausalLM"]
    "intermediate_size": the stored width, as before
    "intermediate_size_per_layer": the width of every layer
    "unpadded_from": {"architectures": as before, "kept_units": {"3": [[0, 100], [120, 640]], …}}

where `kept_units` has the layers of which not the first units were kept, as runs [start, stop).

Scales of FP8 matrices are cut to the blocks of the true width. What the blocks of padding had is in
`unpadded_from.padding_scales` (matrix → its value).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from laguna_serve.plugins.formats.experts import SCALE_BLOCK, read_base_format
from laguna_serve.plugins.layers import WIDTHS_KEY, read_widths
from laguna_serve.plugins.padding import Units, is_dense, scan_layers
from laguna_serve.scripts.checkpoints.headers import (
    INDEX,
    SCALE_SUFFIXES,
    count_stored,
    open_files,
    read_headers,
)
from laguna_serve.scripts.checkpoints.mirrored import MirroredSource, Planned
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, read_config
from laguna_serve.serving.kit.results import JsonObject

ARCHITECTURE = "LagunaDenseForCausalLM"
ORIGIN_KEY = "unpadded_from"
SCALES_KEY = "padding_scales"
MATRIX = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight(_scale)?")


@dataclass(frozen=True, slots=True, eq=False)
class WidthsSource(MirroredSource):
    """A checked dense checkpoint and the units of its layers.

    Attributes:
        unpads: the padding goes; else it comes back.
        padding_scales: scale of an FP8 matrix → what it has in blocks of padding.
    """

    units: dict[int, Units]
    unpads: bool
    padding_scales: Mapping[str, float] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in the output."""
        shape, padded = list(self.tensors[name].shape), self.find(name)
        if padded is not None:
            units, dim = padded
            shape[dim] = units.width if self.unpads else units.stored
            if name.endswith(SCALE_SUFFIXES):
                shape[dim] = -(-shape[dim] // SCALE_BLOCK)
        return tuple(shape)

    def find(self, name: str) -> tuple[Units, int] | None:
        """Find the units of a layer's matrix, or of its scales, and the dimension that has them; None else."""
        match = MATRIX.fullmatch(name)
        if match is None or int(match[1]) not in self.units:
            return None
        return self.units[int(match[1])], 1 if match[2] == "down" else 0

    def change(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Change a tensor to what it is in the output."""
        padded = self.find(name)
        if padded is None:
            return tensor
        if name.endswith(SCALE_SUFFIXES):
            units, dim = padded
            return units.trim_scale(tensor, dim) if self.unpads else units.pad_scale(tensor, dim, self._scale_of(name))
        return padded[0].trim(tensor, padded[1]) if self.unpads else padded[0].pad(tensor, padded[1])

    def plan(self, file: str) -> Planned:
        """Plan the tensors of an output file."""
        entries = {name: entry for name, entry in self.tensors.items() if entry.file == file}
        return {name: (entry.dtype, self.shape(name)) for name, entry in entries.items()}

    def make(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make what stands in the output for one of its tensors: itself, at its width there."""
        return {name: self.change(name, tensor)}

    def describe(self) -> ConfigJson:
        """Describe the output's config.json: the source's, at the widths that are stored."""
        config = dict(self.config)
        if not self.unpads:
            origin = config.pop(ORIGIN_KEY, None) or {}
            config.pop(WIDTHS_KEY)
            # In place, so that the order of the keys is as it was.
            config["architectures"] = origin.get("architectures", ["LagunaForCausalLM"])
            return config
        runs = {str(layer): units.runs for layer, units in self.units.items() if units.runs != ((0, units.width),)}
        origin = {"architectures": config.get("architectures") or ["LagunaForCausalLM"], "kept_units": runs}
        if self.padding_scales:
            origin[SCALES_KEY] = dict(self.padding_scales)
        config["architectures"] = [ARCHITECTURE]
        widths = [self.units[layer].width for layer in sorted(self.units)]
        return {**config, WIDTHS_KEY: widths, ORIGIN_KEY: origin}

    def describe_index(self) -> JsonObject:
        """Describe where the output's tensors are: as before, but for their size."""
        index: JsonObject = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = sum(map(self.size, self.files))
        return index

    def _scale_of(self, name: str) -> float:
        return self.padding_scales.get(name.removesuffix("_scale"), 1.0)

    def parameters(self, *, changed: bool) -> int:
        """How many parameters there are here or in the output."""
        shapes = {name: self.shape(name) if changed else entry.shape for name, entry in self.tensors.items()}
        return count_stored({name: replace(entry, shape=shapes[name]) for name, entry in self.tensors.items()})


def read_padded(folder: Path, name: str) -> WidthsSource:
    """Read a dense checkpoint in stock layout, with the padding found in its files.

    Raises:
        CheckpointError, PaddingError: it is something else, or nothing is padded.
    """
    config = _read_dense(folder, name)
    if config.get(WIDTHS_KEY) is not None:
        raise CheckpointError(f"{name}: expected stock layout, got an unpadded checkpoint; there is nothing to cut off")
    tensors, fingerprint = read_headers(folder, name)
    paths = [folder / file for file in sorted({entry.file for entry in tensors.values()})]
    units = scan_layers(paths, int(config["num_hidden_layers"]))
    stored = {layer: own.stored for layer, own in units.items()}
    if set(stored.values()) != {config.get("intermediate_size")} or len(stored) != config["num_hidden_layers"]:
        expected = f"{config['num_hidden_layers']} layers of intermediate_size {config.get('intermediate_size')}"
        raise CheckpointError(f"{name}: expected {expected}, got {stored}; does config.json fit the files?")
    if all(own.is_whole for own in units.values()) and not any(own.broken is not None for own in units.values()):
        raise CheckpointError(f"{name}: expected padded layers, got none; serve it as it is")
    source = WidthsSource(folder, config, tensors, fingerprint, units, unpads=True)
    return replace(source, padding_scales=_read_padding_scales(source))


def _read_padding_scales(source: WidthsSource) -> dict[str, float]:
    """Matrix → the scale that its blocks of padding have, the first where they differ, which is noted."""
    names = [name for name in source.tensors if name.endswith(SCALE_SUFFIXES) and source.find(name) is not None]
    found, mixed = {}, 0
    with open_files(source.folder, (source.tensors[name].file for name in names)) as files:
        for name in names:
            padded = source.find(name)
            assert padded is not None
            units, dim = padded
            scale, first = files[source.tensors[name].file].get_tensor(name), -(-units.width // SCALE_BLOCK)
            gone = scale.narrow(dim, first, scale.shape[dim] - first)
            if gone.numel():
                found[name.removesuffix("_scale")] = float(gone.flatten()[0])
                mixed += bool((gone != gone.flatten()[0]).any())
    if mixed:
        note = f"scales of the padding differ within {mixed} matrices; `laguna pad` gives the first of each"
        print(f"laguna: note: {note}", file=sys.stderr)
    return found


def read_unpadded(folder: Path, name: str) -> WidthsSource:
    """Read a checkpoint that `unpad` wrote.

    Raises:
        CheckpointError, PaddingError: it is something else, or its tensors are not as its config says.
    """
    config = _read_dense(folder, name)
    widths = read_widths(config, name)
    if widths is None:
        raise CheckpointError(f"{name}: expected {WIDTHS_KEY} in config.json, got none; it is in stock layout already")
    origin = config.get(ORIGIN_KEY) or {}
    kept = origin.get("kept_units", {}) if isinstance(origin, dict) else {}
    stored = int(config["intermediate_size"])
    units = {}
    for layer, width in enumerate(widths):
        runs = kept.get(str(layer), [[0, width]])
        if not _are_runs(runs, width, stored):
            expected = f"{ORIGIN_KEY}.kept_units of layer {layer} to be runs of {width} of {stored} units"
            raise CheckpointError(f"{name}: expected {expected}, got {runs!r}; unpad the checkpoint again")
        units[layer] = Units(stored, tuple((start, stop) for start, stop in runs))
    tensors, fingerprint = read_headers(folder, name)
    scales = origin.get(SCALES_KEY, {}) if isinstance(origin, dict) else {}
    if not isinstance(scales, dict) or not all(isinstance(value, float | int) for value in scales.values()):
        expected = f"{ORIGIN_KEY}.{SCALES_KEY} to be numbers by matrix"
        raise CheckpointError(f"{name}: expected {expected}, got {scales!r}; unpad the checkpoint again")
    source = WidthsSource(folder, config, tensors, fingerprint, units, unpads=False, padding_scales=scales)
    for tensor, entry in tensors.items():
        padded = source.find(tensor)
        if padded is None or tensor.endswith(SCALE_SUFFIXES):
            continue
        if entry.shape[padded[1]] != padded[0].width:
            expected = f"{tensor} of {padded[0].width} units as config.json says"
            raise CheckpointError(
                f"{name}: expected {expected}, got {entry.shape[padded[1]]}; unpad the checkpoint again"
            )
    return source


def _are_runs(runs: object, width: int, stored: int) -> bool:
    """Whether something read from JSON is [[start, stop], …], rising, and makes up `width` of `stored` units."""
    if not isinstance(runs, list) or not all(isinstance(run, list) and len(run) == 2 for run in runs):
        return False
    edges = [edge for run in runs for edge in run]
    if not edges or not all(type(edge) is int for edge in edges):
        return False
    rises = all(before < after for before, after in pairwise(edges))
    return rises and edges[0] >= 0 and edges[-1] <= stored and sum(b - a for a, b in runs) == width


def _read_dense(folder: Path, name: str) -> ConfigJson:
    config = read_config(folder)
    read_base_format(config, name, "layers")
    if not is_dense(config):
        got = config.get("model_type") or config.get("architectures") or "nothing"
        remedy = "for a mixture of experts there is `laguna compact`"
        raise CheckpointError(f"{name}: expected a Laguna of dense layers alone, got {got!r} with others; {remedy}")
    return config
