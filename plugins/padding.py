"""Zero-padded feed-forward layers: which of their units are padding, and how wide they are without it.

A *unit* of a SwiGLU layer is one gate row, one up row and one down column. Stock Laguna knows a single
`intermediate_size`, so that a checkpoint with narrower layers stores them padded with units of zeros, which add
silu(0) · 0 · 0 = 0 to the output. A unit is padding when all three of its parts are exactly zero (−0 counts as zero);
the padding need not be at the end. A layer in which a unit is zero in one part and not in another was not padded by
this rule, or was touched afterwards: it is kept whole.

Of layers in FP8 with 128×128 blocks of scales (formats/experts.py) the padding at the end alone is cut off, so that
every unit that stays lies in the block that it lay in.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from laguna_serve.plugins.formats.experts import SCALE_BLOCK
from laguna_serve.plugins.layers import SPARSE, ConfigJson, LayersError, PaddingError, resolve_layer_kinds

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# A GPU's matrix units work on tiles; a width that is a multiple of a larger tile wastes less of them.
TILES = (128, 64, 32, 16, 8)
MOST_ROUNDING = 0.02

FP8 = torch.float8_e4m3fn
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, FP8: torch.int8}


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a layer that are kept: runs [start, stop) of the `stored` ones, in order.

    `broken` is the first unit that is zero in one part and not in another; the layer is then kept whole.
    """

    stored: int
    runs: tuple[tuple[int, int], ...]
    broken: int | None = None

    @property
    def width(self) -> int:
        """How many units are kept."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is padding."""
        return self.width == self.stored

    def trim(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Trim the kept units of a tensor that has them along `dim`; a view where they are one run."""
        if len(self.runs) == 1:
            start, stop = self.runs[0]
            return tensor.narrow(dim, start, stop - start)
        return tensor.index_select(dim, self.index())

    def pad(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Put zeros where the padding was, the opposite of `trim`."""
        shape = list(tensor.shape)
        shape[dim] = self.stored
        bits = tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor  # torch 2.13 copies no FP8 by index
        return bits.new_zeros(shape).index_copy_(dim, self.index(), bits).view(tensor.dtype)

    def trim_scale(self, scale: torch.Tensor, dim: int) -> torch.Tensor:
        """Return scales of the blocks that hold kept units, which are the first ones."""
        return scale.narrow(dim, 0, -(-self.width // SCALE_BLOCK))

    def pad_scale(self, scale: torch.Tensor, dim: int, value: float) -> torch.Tensor:
        """Undo `trim_scale`, with that value in blocks of padding."""
        shape = list(scale.shape)
        shape[dim] = -(-self.stored // SCALE_BLOCK) - shape[dim]
        return torch.cat([scale, scale.new_full(shape, value)], dim)

    def index(self) -> torch.Tensor:
        """Return the kept units' numbers, [width] int64."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs])

    @property
    def padding(self) -> Units:
        """The units that are not kept; of a whole layer none."""
        edges = [0, *(edge for run in self.runs for edge in run), self.stored]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return Units(self.stored, tuple((start, stop) for start, stop in gaps if stop > start))


def find_units(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Units:
    """Which units of a layer are not padding; gate, up [N, H] and down [H, N] on the host.

    Reads one row of `down`, and the rest of the matrices only from the first unit on that is zero there: of a layer
    without padding a few kilobytes, of a padded one little more than the padding. At least one unit is kept.
    """
    stored = gate.shape[0]
    whole = Units(stored, ((0, stored),))
    zero = _is_zero(_bits(down[:1]), axis=0)
    if not zero.any():
        return whole
    if gate.dtype == FP8:
        return _find_end(gate, up, down)
    first = int(zero.argmax())
    parts = np.stack(
        [
            _is_zero(_bits(gate)[first:], axis=1),
            _is_zero(_bits(up)[first:], axis=1),
            _is_zero(_bits(down)[:, first:], axis=0),
        ]
    )
    padding, touched = parts.all(axis=0), parts.any(axis=0)
    if (broken := touched & ~padding).any():
        return Units(stored, whole.runs, broken=first + int(broken.argmax()))
    kept = np.concatenate([np.ones(first, dtype=bool), ~padding])
    kept[0] |= not kept.any()
    return Units(stored, _find_runs(kept))


def _find_end(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Units:
    """Find the units up to the last that is no padding."""
    bits = (_bits(gate), _bits(up), _bits(down).T)
    padding = np.stack([_is_zero(part, axis=1) for part in bits]).all(axis=0)
    kept = np.flatnonzero(~padding)
    return Units(gate.shape[0], ((0, int(kept[-1]) + 1 if len(kept) else 1),))


def scan_layers(files: Iterable[Path], layers: int) -> dict[int, Units]:
    """Layer number → its units, for every dense layer found in the safetensors files.

    Raises:
        PaddingError: a layer lacks one of its three matrices, or they do not fit each other.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        found = {}
        for layer in range(layers):
            names = [f"model.layers.{layer}.mlp.{name}.weight" for name in PROJECTIONS]
            if not any(name in where for name in names):
                continue
            for name in names:
                if name not in where:
                    raise PaddingError(f"{name}: expected it beside the other two, got none; is the download complete?")
            gate, up, down = (where[name].get_tensor(name) for name in names)
            if not gate.shape == up.shape == down.shape[::-1] or gate.dtype not in _INTEGERS:
                got = ", ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in (gate, up, down))
                expected = "gate and up [N, H] and down [H, N] in bf16, fp16, fp32 or FP8"
                raise PaddingError(f"model.layers.{layer}.mlp: expected {expected}, got {got}; fetch it again")
            found[layer] = find_units(gate, up, down)
        return found


def is_dense(config: ConfigJson) -> bool:
    """Whether a Laguna config.json describes dense layers alone, in any of its spellings (layers.py)."""
    if config.get("model_type") != "laguna":
        return False
    try:
        return SPARSE not in resolve_layer_kinds(config)
    except LayersError as error:
        raise PaddingError(f"config.json: {error}; fetch it again") from None


def round_width(width: int, most: int) -> int:
    """Round the width to allocate on a GPU, at most `most`.

    It is a multiple of the largest tile for which that adds 2% at most.
    """
    for tile in TILES:
        rounded = -(-width // tile) * tile
        if rounded <= min(most, width * (1 + MOST_ROUNDING)):
            return rounded
    return width


def _bits(tensor: torch.Tensor) -> npt.NDArray[np.integer[Any]]:
    """View the same memory as integers: NumPy knows no bf16, and an OR is quicker than a comparison."""
    array: npt.NDArray[np.integer[Any]] = tensor.view(_INTEGERS[tensor.dtype]).numpy()
    return array


def _is_zero(bits: npt.NDArray[np.integer[Any]], axis: int) -> npt.NDArray[np.bool_]:
    """Whether all values along an axis are ±0: of their bits joined by OR, only the sign is set, or none."""
    joined = np.bitwise_or.reduce(bits, axis=axis)
    zero: npt.NDArray[np.bool_] = (joined & np.iinfo(joined.dtype).max) == 0
    return zero


def _find_runs(kept: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))
