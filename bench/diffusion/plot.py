"""When a draft pays, as a picture: speed-up against the chance that it knows the next state, and what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.bench.diffusion.draft_cost import DRAFTS, find_best
from laguna_serve.bench.diffusion.result import DiffusionResult, ProposerPoint
from laguna_serve.serving.kit.figures import BAD, SOFT, note_source, open_figure, style_axes

LINES = ("#3d6fb4", "#12857d", "#8a6d3b")
# Of drafts in fewer bits, three at most.
MEASURED_COLORS = ("#7a4fa3", "#c2417c", "#4f6d1f")
CHANCES = [at / 100 for at in range(30, 98)]
MEASURED = "draft, gated"
MARKERS = "+x1234"


def draw(result: DiffusionResult, path: Path) -> None:
    """Write the PNG of a result with a draft."""
    assert result.next_commits is not None
    assert result.cost is not None
    with open_figure(path, 1, 1, figsize=(11, 5)) as (figure, axes):
        figure.subplots_adjust(left=0.065, right=0.66, top=0.84, bottom=0.2)
        style_axes(
            axes,
            "When does a draft pay?",
            "a pass of the draft per state; lines: LLaDA-8B's 24-layer draft on an H100, by arithmetic",
        )
        for (name, cost), color in zip(DRAFTS.items(), LINES, strict=True):
            axes.plot(
                CHANCES, [find_best(at, cost) for at in CHANCES], color=color, label=f"{name}: a pass costs {cost:.2f}"
            )
        axes.axhline(1.0, color=SOFT, linewidth=1)
        of_target = [point for point in result.points if point.proposer == MEASURED]
        _mark(axes, Path(result.model).name + "'s draft", result.next_commits[1], result.cost, of_target, BAD)
        for draft, color in zip(result.drafts, MEASURED_COLORS, strict=False):
            points = [point for point in draft.points if point.proposer == MEASURED]
            _mark(axes, f"the same in {draft.weights}", draft.next_commits[1], draft.cost, points, color)
        axes.set_ylim(0, 2.7)
        axes.set_xlabel("chance that the draft's next state is the target's")
        axes.set_ylabel("speed-up")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02))
        where = [f"{result.prompts} prompts", result.environment.device_name, result.environment.date[:10]]
        note_source(figure, 0.065, where)


def _mark(axes: Axes, label: str, chance: float, cost: float, measured: Sequence[ProposerPoint], color: str) -> None:
    """Mark what a draft should bring, and what it brought."""
    axes.scatter(
        [chance],
        [find_best(chance, cost)],
        s=60,
        facecolors="none",
        edgecolors=color,
        label=f"{label}, {cost:.2f}: by arithmetic",
        zorder=4,
    )
    for point, marker in zip(measured, itertools.cycle(MARKERS)):  # loads differ little: one over the other
        low, high = point.speedup_ci95 or (point.speedup, point.speedup)
        axes.vlines([chance], low, high, color=color)
        about = f"measured, {point.concurrency} at once"
        axes.scatter([chance], [point.speedup], s=60, marker=marker, color=color, label=about, zorder=4)
