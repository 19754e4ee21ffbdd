"""Every mask of the frontier: what is pruned by which score, and how many bytes are left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import ExpertShape, Pruning, draw_random_mask, rank_groups
from laguna_serve.scripts.checkpoints.compaction.base import Base
from laguna_serve.scripts.checkpoints.compaction.savings import measure_savings
from laguna_serve.scripts.checkpoints.compaction.shards import Compaction
from laguna_serve.scripts.training.pruning.artefacts import RATIOS
from laguna_serve.scripts.training.pruning.wholes import prune_experts
from laguna_serve.serving.checkpoint import Target

if TYPE_CHECKING:
    from laguna_serve.scripts.training.pruning.changes import Change
    from laguna_serve.scripts.training.pruning.measurement import Measured

GROUPS = ("loss", "heapr", "output", "magnitude", "reap")
ATOMS = ("loss", "heapr")
WHOLE, CONSTANTS, RANDOM = "reap-experts", "mone", "random"
# Routed to block by block; beside it the same blocks with the parent's routing.
REPACKED, PARENT = "heapr-repacked", "heapr"
CONSTANT_BYTES = 2  # MoNE's constants, in bf16


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A mask by a score on one draw of the calibration text; `change`: what it does to the model."""

    name: str
    ratio: float
    seed: int
    change: Change

    @property
    def digest(self) -> str:
        """SHA-256 of what decides about the loss, so that equal masks are measured once."""
        change, layers = self.change, range(len(self.change.pruning.keep))
        digest = hashlib.sha256(f"{change.closed} {change.repacked}".encode())
        for layer in layers:
            blocks = change.blocks(layer).numpy()
            digest.update((blocks if change.repacked else blocks >= 0).tobytes())
            if change.constants is not None:
                digest.update(change.constants[layer][change.empty[layer]].tobytes())
        return digest.hexdigest()


def list_masks(measured: Measured, shape: ExpertShape, block_size: int, seed: int, top_k: int) -> Iterator[Mask]:
    """List every mask that one draw of the calibration text gives.

    Args:
        top_k: experts that a token is routed to; so many at least stay for the router in every layer.
    """
    from laguna_serve.scripts.training.pruning.changes import Change
    from laguna_serve.scripts.training.pruning.scores import SCORES, group_atoms

    scores = {name: measured.scores(name) for name in SCORES}
    grouped = {name: group_atoms(scores[name], block_size) for name in GROUPS}
    grouped |= {f"{name}-atoms": group_atoms(scores[name], 1) for name in ATOMS}
    indices = grouped["loss"][0]
    for ratio in RATIOS:
        for name, (groups, sums) in grouped.items():
            yield Mask(name, ratio, seed, Change(Pruning(rank_groups(sums, ratio), groups)))
        parent, sums = grouped[PARENT]
        yield Mask(REPACKED, ratio, seed, Change(Pruning(rank_groups(sums, ratio), parent), repacked=True))
        gone = prune_experts(measured.rank_experts("reap"), ratio, top_k)
        yield Mask(WHOLE, ratio, seed, Change(keep_whole(gone, indices), closed=True))
        gone = prune_experts(measured.rank_experts("mone"), ratio, 1)
        yield Mask(CONSTANTS, ratio, seed, Change(keep_whole(gone, indices), constants=measured.constants()))
        keep = draw_random_mask(shape, indices.shape[2], ratio, seed)
        yield Mask(RANDOM, ratio, seed, Change(Pruning(keep, indices)))


def keep_whole(keep: npt.NDArray[np.bool_], indices: npt.NDArray[np.int64]) -> Pruning:
    """Keep all blocks of the experts of `keep` [L, E], and none of the others."""
    return Pruning(np.repeat(keep[..., None], indices.shape[2], axis=2), indices)


def weigh_mask(mask: Mask, base: Base, target: Target, stored: str) -> int:
    """Bytes of the whole model as `laguna compact` stores what the mask keeps, MoNE's constants beside it.

    stored: the experts' format, plain or fp8. The router keeps its rows.
    """
    change = mask.change
    size = measure_savings(Compaction(base, change.pruning, zeroed=False, format=stored), target).bytes_after
    if change.constants is None:
        return size
    return size + int(change.empty.sum()) * base.shape.hidden_size * CONSTANT_BYTES
