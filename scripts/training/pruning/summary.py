"""What pruning by these scores removes: summary.json, and a page of figures per layer.

Beside the published arrays, under the names that the Laguna Martini artefacts have: `summary.json`, "compact
machine-readable results", and `native_group_pruning_stats.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import ExpertShape
from laguna_serve.scripts.training.pruning.artefacts import RATIOS
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.memory import GIB

VECTORS = 3  # of an atom: gate row, up row, down column
BF16_BYTES = 2
QUARTILES = (0, 25, 50, 75, 100)


class PruningShare(msgspec.Struct, frozen=True, kw_only=True):
    """One keep mask: what it removes of the routed experts' parameters."""

    ratio: float
    pruned_groups: int
    removable_parameters: int
    removable_bytes_bf16: int
    pruned_groups_per_layer: tuple[int, ...]


class LayerScores(msgspec.Struct, frozen=True, kw_only=True):
    """A sparse layer's atoms: least score, quartiles and largest; `unrouted`: experts that no token was routed to."""

    layer: int
    quantiles: tuple[float, ...]
    mean: float
    unrouted: int | None = None


class PruningSummary(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="laguna_serve.expert_summary/1",
):
    """A model's scores and masks in figures.

    Attributes:
        score: how atoms were scored.
        block_size, groups: atoms in a group; groups of all experts.
        group_parameters: of one group: three vectors of each of its atoms.
        routed_parameters: of all routed experts.
        loss: mean loss in nats of the text that was scored on, where it was measured.
    """

    model: str
    score: str
    sparse_layers: int
    experts: int
    atoms: int
    block_size: int
    groups: int
    group_parameters: int
    routed_parameters: int
    loss: float | None = None
    shares: tuple[PruningShare, ...]
    layers: tuple[LayerScores, ...]


def summarise(
    model: str,
    score: str,
    shape: ExpertShape,
    files: Mapping[str, npt.NDArray[Any]],
    loss: float | None = None,
    tokens: npt.NDArray[np.float64] | None = None,
) -> PruningSummary:
    """Count and summarise. `files`: as make_artefacts gives them; `tokens` [L, E]: routed to each expert."""
    scores, groups = files["atomic_scores"], files["group_scores_importance_sorted"]
    L, E, N = scores.shape
    block_size = N // groups.shape[-1]
    group_parameters = VECTORS * block_size * shape.hidden_size
    shares = []
    for ratio in RATIOS:
        gone = ~files[f"group_keep_mask_{ratio * 100:.0f}pct"]
        removable = int(gone.sum()) * group_parameters
        shares.append(
            PruningShare(
                ratio=ratio,
                pruned_groups=int(gone.sum()),
                removable_parameters=removable,
                removable_bytes_bf16=BF16_BYTES * removable,
                pruned_groups_per_layer=tuple(int(count) for count in gone.sum(axis=(1, 2))),
            )
        )
    return PruningSummary(
        model=model,
        score=score,
        sparse_layers=L,
        experts=E,
        atoms=N,
        block_size=block_size,
        groups=groups.size,
        group_parameters=group_parameters,
        routed_parameters=groups.size * group_parameters,
        loss=loss,
        shares=tuple(shares),
        layers=tuple(
            LayerScores(
                layer=layer,
                quantiles=tuple(float(value) for value in np.percentile(scores[index], QUARTILES)),
                mean=float(scores[index].mean(dtype=np.float64)),
                unrouted=None if tokens is None else int((tokens[index] == 0).sum()),
            )
            for index, layer in enumerate(shape.layers)
        ),
    )


def write_summary(out: Path, summary: PruningSummary) -> None:
    """Write both files. Raises WriteError."""
    write_json(out / "summary.json", to_json(summary))
    write_text(out / "native_group_pruning_stats.md", render_stats(summary))


def render_stats(summary: PruningSummary) -> str:
    """Render a Markdown page with a row per sparse layer."""
    per_layer = summary.groups // summary.sparse_layers
    lines = [
        f"# Groups pruned per layer, by the score `{summary.score}`",
        "",
        f"{summary.groups:,} groups of {summary.block_size} atoms, {per_layer:,} in each of"
        f" {summary.sparse_layers} sparse layers; a group has {summary.group_parameters:,} parameters. Every expert"
        " keeps one at least.",
        "",
        _tabulate(summary, per_layer).to_markdown(),
        "",
    ]
    lines += [
        f"- {share.ratio:.0%}: {share.removable_parameters:,} of {summary.routed_parameters:,} routed parameters,"
        f" {share.removable_bytes_bf16 / GIB:.3f} GiB in bf16"
        for share in summary.shares
    ]
    return "\n".join(lines) + "\n"


def _tabulate(summary: PruningSummary, per_layer: int) -> Table:
    heads = ("layer", "least score", "first quartile", "median", "third quartile", "largest")
    rows = [
        [
            *(str(layer.layer), *(f"{value:.3g}" for value in layer.quantiles)),
            *(f"{count:,} ({count / per_layer:.1%})" for count in counts),
        ]
        for layer, *counts in zip(
            summary.layers, *(share.pruned_groups_per_layer for share in summary.shares), strict=True
        )
    ]
    totals = ["all", "", "", "", "", "", *(f"{share.pruned_groups:,}" for share in summary.shares)]
    every = (*heads, *(f"{share.ratio:.0%}: groups pruned" for share in summary.shares))
    return Table("r" * len(every), every, [*rows, totals])
