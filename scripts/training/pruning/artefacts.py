"""The artefacts of structured pruning: scores read, grouped and ranked, and written with a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import (
    ExpertShape,
    PruningError,
    draw_random_mask,
    load_array,
    narrow_scores,
    rank_groups,
)
from laguna_serve.serving.kit.files import hash_file, write_stream
from laguna_serve.serving.kit.results import write_indented

RATIOS = (0.10, 0.25, 0.40)


class ScoresSource(TypedDict, total=False):
    """Where atomic scores come from, as the manifest says it."""

    score: Required[str]
    scores_sha256: str
    text: str
    documents: int
    rows: int
    tokens: int
    loss: float
    dtype: str
    device: str


class ScoresManifest(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="laguna_serve.expert_scores/1",
):
    """How the artefacts were made, and a SHA-256 of each.

    Attributes:
        score: how atoms were scored (scores.py), or the file that the scores come from, then with its digest.
        text, documents, rows, tokens: what they were measured on; `loss`: the mean loss there, in nats.
        dtype, device: what it was computed in and on.
        block_size: atoms in a group.
        seed: of the random masks.
    """

    model: str
    score: str
    scores_sha256: str | None = None
    text: str | None = None
    documents: int | None = None
    rows: int | None = None
    tokens: int | None = None
    loss: float | None = None
    dtype: str | None = None
    device: str | None = None
    block_size: int
    seed: int
    python: str
    versions: dict[str, str]
    sha256: dict[str, str]


def read_scores(path: Path, shape: ExpertShape) -> npt.NDArray[np.float32]:
    """Somebody else's atomic scores, checked."""
    scores = load_array(path, mapped=False)
    expected = (len(shape.layers), shape.num_experts, shape.intermediate_size)
    if scores.shape != expected or scores.dtype.kind != "f":
        got = f"{scores.dtype} {list(scores.shape)}"
        raise PruningError(f"{path}: expected float scores {list(expected)}, got {got}; are they for this model?")
    return narrow_scores(scores, path)


def make_artefacts(scores: npt.NDArray[np.float32], block_size: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """File name → array, everything that is derived from the scores."""
    from laguna_serve.scripts.training.pruning.scores import group_atoms

    indices, group_scores = group_atoms(scores, block_size)
    L, E, N = scores.shape
    shape = ExpertShape(tuple(range(L)), E, N, 0)
    files: dict[str, npt.NDArray[Any]] = {
        "atomic_scores": scores,
        "group_indices_importance_sorted": indices,
        "group_scores_importance_sorted": group_scores,
    }
    for ratio in RATIOS:
        files[f"group_keep_mask_{ratio * 100:.0f}pct"] = rank_groups(group_scores, ratio)
        files[f"group_keep_mask_random_{ratio * 100:.0f}pct"] = draw_random_mask(shape, N // block_size, ratio, seed)
    return files


def write_artefacts(out: Path, files: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """Write the arrays; file name → SHA-256."""
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, array in files.items():
        path = out / f"{name}.npy"
        write_stream(path, lambda file, array=array: np.save(file, array))  # type: ignore[misc]
        digests[path.name] = hash_file(path)
    return digests


def write_manifest(out: Path, manifest: ScoresManifest) -> None:
    """Write MANIFEST.json beside the arrays."""
    write_indented(out / "MANIFEST.json", manifest)


def choose_block_size(given: int | None, shape: ExpertShape) -> int:
    """Choose the given width of a group, by default an eighth of an expert."""
    size = given if given is not None else max(1, shape.intermediate_size // 8)
    if size < 1 or shape.intermediate_size % size:
        expected = f"a divisor of the experts' width {shape.intermediate_size}"
        raise PruningError(f"--block-size: expected {expected}, got {size}; an eighth of the width is usual")
    if (most := 1 - size / shape.intermediate_size) < RATIOS[-1]:
        expected = f"groups of which {RATIOS[-1]:.0%} can go, each expert keeping one"
        raise PruningError(f"--block-size: expected {expected}, got {size}, of which {most:.0%} can; lower it")
    return size
