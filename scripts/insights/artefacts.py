"""What the pictures show of the artefacts: a layer's scores and how much of it every mask prunes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import PruningError, load_array
from laguna_serve.scripts.training.pruning.summary import PruningSummary
from laguna_serve.serving.kit.results import ResultError, read_result

SCORES, SUMMARY = "atomic_scores.npy", "summary.json"
MASK = re.compile(r"group_keep_mask_(\d+)pct\.npy")
QUANTILES = (5, 25, 50, 75, 95)


class LayerInsight(msgspec.Struct, frozen=True, kw_only=True):
    """One sparse layer.

    Attributes:
        layer: its number in the model; without a summary.json that says it, counted among the sparse ones, from 1.
        quantiles: the 5, 25, 50, 75 and 95% quantiles of log10 of its atoms' scores; empty where none is positive.
        unscored: share of its atoms whose score is 0.
        pruned: share of its groups that each mask prunes.
    """

    layer: int
    quantiles: tuple[float, ...]
    unscored: float
    pruned: tuple[float, ...]


class ArtefactInsights(msgspec.Struct, frozen=True, kw_only=True):
    """Scores and masks of a model.

    Attributes:
        score: how atoms were scored, where summary.json says it.
        ratios: of the masks, as their names say.
        fall: orders of magnitude by which the median score of the last third of the layers is below that of the first.
    """

    folder: str
    score: str | None
    atoms: int
    groups: int
    ratios: tuple[float, ...]
    layers: tuple[LayerInsight, ...]
    fall: float | None


def read_insights(folder: Path) -> ArtefactInsights:
    """Read a folder that score_experts.py wrote, or the published artefacts.

    Raises:
        PruningError: scores or masks are missing, cannot be read or do not fit each other.
    """
    scores = _read(folder / SCORES, "float scores [layers, experts, atoms]", "f")
    L, E, _ = scores.shape
    paths = {int(match[1]): path for path in folder.iterdir() if (match := MASK.fullmatch(path.name))}
    if not paths:
        expected = "group_keep_mask_10pct.npy or another mask"
        raise PruningError(f"{folder}: expected {expected}, got none; scripts/score_experts.py writes them")
    masks = [_read(paths[percent], f"bool [{L}, {E}, groups]", "b") for percent in sorted(paths)]
    for percent, mask in zip(sorted(paths), masks, strict=True):
        if mask.shape != (L, E, masks[0].shape[2]):
            expected = f"a mask of shape {[L, E, masks[0].shape[2]]}, as the scores and the other masks are"
            raise PruningError(f"{paths[percent]}: expected {expected}, got {list(mask.shape)}; score again")
    summary = _read_summary(folder / SUMMARY)
    numbers = [part.layer for part in summary.layers] if summary and len(summary.layers) == L else [*range(1, L + 1)]
    third = max(1, L // 3)
    first, last = (_find_median(part) for part in (scores[:third], scores[-third:]))
    return ArtefactInsights(
        folder=str(folder),
        score=summary.score if summary else None,
        atoms=scores.size,
        groups=masks[0].size,
        ratios=tuple(percent / 100 for percent in sorted(paths)),
        layers=tuple(
            LayerInsight(
                layer=number,
                quantiles=_find_quantiles(scores[at]),
                unscored=float((scores[at] <= 0).mean()),
                pruned=tuple(float((~mask[at]).mean()) for mask in masks),
            )
            for at, number in enumerate(numbers)
        ),
        fall=None if first is None or last is None else first - last,
    )


def _find_quantiles(scores: npt.NDArray[Any]) -> tuple[float, ...]:
    positive = scores[scores > 0]
    return tuple(np.percentile(np.log10(positive), QUANTILES).tolist()) if positive.size else ()


def _find_median(scores: npt.NDArray[Any]) -> float | None:
    found = _find_quantiles(scores)
    return found[2] if found else None


def _read_summary(path: Path) -> PruningSummary | None:
    """Read our summary.json; None where there is none, or somebody else's of other contents."""
    try:
        return read_result(path, PruningSummary)
    except ResultError:
        return None


def _read(path: Path, expected: str, kind: str) -> npt.NDArray[Any]:
    array = load_array(path, mapped=False)
    if array.ndim != 3 or array.dtype.kind != kind or not array.size:
        got = f"{array.dtype} {list(array.shape)}"
        raise PruningError(f"{path}: expected {expected}, got {got}; pass the folder of the artefacts as published")
    if kind == "f" and not np.isfinite(array).all():
        raise PruningError(f"{path}: expected finite scores, got {int((~np.isfinite(array)).sum())} that are not")
    return array
