"""Structured expert pruning: the published masks, checked, and the blocks of weights that they keep.

An *atom* of an expert is one gate row, one up row and one down column. The published artefacts sort an expert's atoms
by importance into groups of equal width and keep some groups of each expert:

    group_indices [L, E, G, B] int64   the atoms of each group; for every expert a permutation of its G·B atoms
    keep_mask     [L, E, G] bool       which groups stay, at least one per expert

with L sparse layers, E experts, G groups of B atoms. A kept group becomes a *block*, B atoms stored together, and a
layer's blocks lie in the order of its experts, so that expert e owns the slice block_start[e]:block_start[e + 1].

Source: the formats are those of the Laguna Martini artefacts (https://huggingface.co/poolside-laguna-hackathon/laguna-martini).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.layers import SPARSE, LayersError, read_setting, resolve_layer_kinds

# What NumPy raises for a file that is no array, or only the beginning of one.
UNREADABLE = (OSError, ValueError, EOFError, MemoryError, BadZipFile, TokenError)


class PruningError(ValueError):
    """A mask, a permutation or a config that does not describe a pruned Laguna, as one line."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The routed experts of a Laguna model. `layers` are the numbers of its sparse layers."""

    layers: tuple[int, ...]
    num_experts: int
    intermediate_size: int
    hidden_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Pruning:
    """A checked pair of artefacts: `keep` [L, E, G] bool and `indices` [L, E, G, B] int64."""

    keep: npt.NDArray[np.bool_]
    indices: npt.NDArray[np.int64]

    @property
    def block_size(self) -> int:
        """Atoms in a block."""
        return int(self.indices.shape[-1])

    @property
    def blocks_per_expert(self) -> int:
        """Blocks of an expert of which nothing is pruned."""
        return int(self.keep.shape[-1])

    @property
    def kept_blocks(self) -> list[int]:
        """Kept blocks of each sparse layer."""
        return [int(count) for count in self.keep.sum(axis=(1, 2))]

    @property
    def pruned_blocks(self) -> int:
        """Pruned blocks of all layers together."""
        return int(self.keep.size - self.keep.sum())

    def block_start(self, layer: int) -> npt.NDArray[np.int32]:
        """[E + 1]: the first block of every expert in sparse layer number `layer` (counted among the sparse ones)."""
        widths = self.keep[layer].sum(axis=-1, dtype=np.int32)
        return np.concatenate([np.zeros(1, np.int32), np.cumsum(widths, dtype=np.int32)])

    def atoms(self, layer: int, expert: int) -> npt.NDArray[np.int64]:
        """[n, B]: the atoms of the expert's kept blocks, in the order in which they are stored."""
        kept: npt.NDArray[np.int64] = self.indices[layer, expert][self.keep[layer, expert]]
        return kept


def read_shape(config: Mapping[str, Any], name: str) -> ExpertShape:
    """Read the experts that a Laguna config.json describes.

    Raises:
        PruningError: the config is not that of a Laguna with routed experts; the message begins with `name`.
    """
    if config.get("model_type") != "laguna":
        got = config.get("model_type") or config.get("architectures") or "nothing"
        raise PruningError(f"{name}: expected model_type 'laguna', got {got!r}; pass the base Laguna checkpoint")
    values: dict[str, int] = {}
    for key in ("num_hidden_layers", "num_experts", "moe_intermediate_size", "hidden_size"):
        value = read_setting(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PruningError(f"{name}: expected {key} to be a positive integer, got {value!r}; fetch it again")
        values[key] = value
    try:
        kinds = resolve_layer_kinds(config)
    except LayersError as error:
        raise PruningError(f"{name}: {error}; fetch it again") from None
    layers = tuple(number for number, kind in enumerate(kinds) if kind == SPARSE)
    if not layers:
        raise PruningError(f"{name}: expected sparse layers, got a model without any; there is nothing to prune")
    return ExpertShape(layers, values["num_experts"], values["moe_intermediate_size"], values["hidden_size"])


def read_pruning(keep_mask: Path, group_indices: Path, shape: ExpertShape) -> Pruning:
    """Read and check the two files. Raises PruningError naming the file and what is wrong with it."""
    return check_pruning(load_array(keep_mask), load_array(group_indices), shape, str(keep_mask), str(group_indices))


def check_pruning(
    keep: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    shape: ExpertShape,
    keep_name: str = "keep mask",
    indices_name: str = "group indices",
) -> Pruning:
    """Check that the arrays fit the model and each other. Raises PruningError beginning with the array's name."""
    L, E, N = len(shape.layers), shape.num_experts, shape.intermediate_size
    if indices.dtype != np.int64:
        raise PruningError(f"{indices_name}: expected dtype int64, got {indices.dtype}; pass the published array")
    if indices.ndim != 4 or indices.shape[:2] != (L, E) or indices.shape[2] * indices.shape[3] != N:
        expected = f"shape [{L}, {E}, G, B] with G·B = {N}"
        raise PruningError(f"{indices_name}: expected {expected}, got {list(indices.shape)}; is it for this model?")
    if keep.dtype != np.bool_:
        raise PruningError(f"{keep_name}: expected dtype bool, got {keep.dtype}; save it with .astype(bool)")
    if keep.shape != indices.shape[:3]:
        expected = f"shape {list(indices.shape[:3])}, that of the indices' groups"
        raise PruningError(f"{keep_name}: expected {expected}, got {list(keep.shape)}; is it for this model?")
    _check_permutations(indices, shape, indices_name)
    empty = np.argwhere(~keep.any(axis=-1))
    if len(empty):
        layer, expert = shape.layers[empty[0][0]], empty[0][1]
        expected = "at least one kept group in every expert"
        where = f"none in layer {layer}, expert {expert} ({len(empty)} such experts)"
        raise PruningError(f"{keep_name}: expected {expected}, got {where}; keep its best group")
    return Pruning(keep, indices)


def draw_random_mask(shape: ExpertShape, groups: int, ratio: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw the control: a keep mask.

    That is [L, E, groups] with ⌊ratio · all groups⌋ pruned at random, at least one kept in every expert.

    Raises:
        PruningError: the ratio is not in [0, 1), or more than can go while every expert keeps a group.
    """
    scores = np.random.default_rng(seed).random((len(shape.layers), shape.num_experts, groups), dtype=np.float32)
    return rank_groups(scores, ratio)


def rank_groups(scores: npt.NDArray[np.float32], ratio: float, name: str = "ratio") -> npt.NDArray[np.bool_]:
    """Prune the ⌊ratio · all⌋ groups of lowest score over all layers, except the best group of every expert.

    scores [L, E, G], higher is more important; of equal scores the earlier group goes first. Returns keep [L, E, G].
    `name`: the ratio's, in messages.

    Raises:
        PruningError: as `draw_random_mask`, or scores that are not finite.
    """
    if not 0 <= ratio < 1:
        tenth = "0.1 prunes a tenth of the groups"
        raise PruningError(f"{name}: expected at least 0 and less than 1, got {ratio}; {tenth}")
    if scores.ndim != 3 or not np.isfinite(scores).all():
        raise PruningError(f"scores: expected finite [layers, experts, groups], got shape {list(scores.shape)}")
    count = int(ratio * scores.size + 1e-9)
    best = scores.argmax(axis=-1)
    candidates = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(candidates, best[..., None], False, axis=-1)
    if count > candidates.sum():
        limit = candidates.sum() / scores.size
        raise PruningError(
            f"{name}: expected at most {limit:.4g} with one group kept in every expert, got {ratio}; lower it"
        )
    order = np.argsort(np.where(candidates, scores, np.inf), axis=None, kind="stable")
    keep = np.ones(scores.size, dtype=bool)
    keep[order[:count]] = False
    return keep.reshape(scores.shape)


def narrow_scores(scores: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    """Return scores as float32, in which all of them must be finite.

    Raises:
        PruningError: some are not.
    """
    with np.errstate(over="ignore"):
        narrowed = scores.astype(np.float32)
    if wrong := int((~np.isfinite(narrowed)).sum()):
        raise PruningError(f"{path}: expected finite float32 scores, got {wrong} that are not; score again")
    return narrowed


def _check_permutations(indices: npt.NDArray[np.int64], shape: ExpertShape, name: str) -> None:
    flat = np.sort(indices.reshape(*indices.shape[:2], -1), axis=-1)
    wrong = np.argwhere((flat != np.arange(shape.intermediate_size)).any(axis=-1))
    if len(wrong):
        layer, expert = shape.layers[wrong[0][0]], wrong[0][1]
        expected = f"a permutation of 0…{shape.intermediate_size - 1} for every expert"
        where = f"something else in layer {layer}, expert {expert} ({len(wrong)} such experts)"
        raise PruningError(f"{name}: expected {expected}, got {where}; pass the published array")


def load_array(path: Path, *, mapped: bool = True) -> npt.NDArray[Any]:
    """Read the one array of a .npy file, by default where it lies.

    Raises:
        PruningError: there is none, or it cannot be read.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise PruningError(f"{path}: expected a NumPy file, got none; check the path") from None
    except UNREADABLE as error:
        raise PruningError(f"{path}: expected a NumPy file (.npy), got one that cannot be read ({error})") from None
    if not isinstance(array, np.ndarray):
        raise PruningError(f"{path}: expected one array (.npy), got an archive; save the array alone")
    return array
