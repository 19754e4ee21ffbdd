"""Which groups go: by the published files, or by a seeded draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import (
    ExpertShape,
    Pruning,
    PruningError,
    check_pruning,
    draw_random_mask,
    load_array,
    read_pruning,
)
from laguna_serve.serving.kit.files import hash_file
from laguna_serve.serving.kit.results import JsonObject


def choose_pruning(
    shape: ExpertShape,
    keep_mask: Path | None,
    group_indices: Path | None,
    ratio: float | None,
    block_size: int | None,
    seed: int,
) -> tuple[Pruning, JsonObject]:
    """Choose what is pruned, and where that comes from: digests of the files, or the draw's ratio and seed.

    A mask needs its indices; a draw takes the groups of the indices, or atoms in their own order by `block_size`.

    Raises:
        PruningError: a file that cannot be read or does not fit, or a ratio or block size that cannot be had.
    """
    source: JsonObject = {}
    if group_indices is not None:
        source["group_indices_sha256"] = _hash(group_indices)
    if keep_mask is not None and group_indices is not None:
        source |= {"keep_mask": keep_mask.name, "keep_mask_sha256": _hash(keep_mask)}
        return read_pruning(keep_mask, group_indices, shape), source
    assert ratio is not None
    indices = _number(block_size, shape) if group_indices is None else _read_indices(group_indices, shape)
    keep = draw_random_mask(shape, indices.shape[2], ratio, seed)
    return check_pruning(keep, indices, shape), {**source, "random_ratio": ratio, "seed": seed}


def _read_indices(path: Path, shape: ExpertShape) -> npt.NDArray[np.int64]:
    """Read indices alone, checked by way of a mask that keeps everything."""
    indices = load_array(path)
    keep = np.ones(indices.shape[:3], dtype=bool)
    return check_pruning(keep, indices, shape, "keep mask", str(path)).indices


def _number(block_size: int | None, shape: ExpertShape) -> npt.NDArray[np.int64]:
    """Make groups of atoms in their own order."""
    N = shape.intermediate_size
    size = block_size if block_size is not None else max(1, N // 8)
    if size < 1 or N % size:
        raise PruningError(
            f"--block-size: expected a divisor of the experts' width {N}, got {size}; 8 blocks are usual"
        )
    return np.broadcast_to(np.arange(N).reshape(-1, size), (len(shape.layers), shape.num_experts, N // size, size))


def _hash(path: Path) -> str | None:
    try:
        return hash_file(path)
    except OSError:
        return None  # read_pruning says what is wrong with it
