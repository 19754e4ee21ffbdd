"""Masks of whole experts, over all layers together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import PruningError


def prune_experts(scores: npt.NDArray[np.float64], ratio: float, least: int) -> npt.NDArray[np.bool_]:
    """Prune the ⌊ratio · all⌋ experts of lowest score over all layers, the best `least` of every layer excepted.

    scores [L, E], higher is more important; of equal ones the earlier goes first. Returns keep [L, E].

    Raises:
        PruningError: more than can go.
    """
    L, E = scores.shape
    count = int(ratio * scores.size + 1e-9)
    if count > L * (E - least):
        expected = f"at most {(E - least) / E:.4g} with {least} experts kept in every layer"
        raise PruningError(f"ratio: expected {expected}, got {ratio}; lower it")
    order = np.argsort(scores, axis=-1, kind="stable")
    candidates = scores.astype(np.float64)
    np.put_along_axis(candidates, order[:, E - least :], np.inf, axis=-1)
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(candidates, axis=None, kind="stable")[:count]] = False
    return keep.reshape(L, E)
