"""When a draft pays, as a picture: speed-up against the chance that it knows the next state, and what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

from laguna_serve.bench.diffusion.draft_cost import DRAFTS, find_best
from laguna_serve.bench.diffusion.result import DiffusionResult
from laguna_serve.serving.kit.figures import BAD, SOFT, note_source, open_figure, style_axes

LINES = ("#3d6fb4", "#12857d", "#8a6d3b")
CHANCES = [at / 100 for at in range(30, 98)]
MEASURED = "draft, gated"
MARKERS = "+x1234"


def draw(result: DiffusionResult, path: Path) -> None:
    """Write the PNG of a result with a draft."""
    assert result.next_commits is not None
    assert result.cost is not None
    chance = result.next_commits[1]
    with open_figure(path, 1, 1, figsize=(8, 5)) as (figure, axes):
        figure.subplots_adjust(left=0.09, right=0.97, top=0.84, bottom=0.2)
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
        expected = find_best(chance, result.cost)
        axes.scatter(
            [chance],
            [expected],
            s=60,
            facecolors="none",
            edgecolors=BAD,
            label=f"{Path(result.model).name}'s draft, {result.cost:.2f}: by arithmetic",
            zorder=4,
        )
        measured = [point for point in result.points if point.proposer == MEASURED]
        for point, marker in zip(measured, itertools.cycle(MARKERS)):  # loads differ little: one over the other
            low, high = point.speedup_ci95
            axes.vlines([chance], low, high, color=BAD)
            label = f"measured, {point.concurrency} at once"
            axes.scatter([chance], [point.speedup], s=60, marker=marker, color=BAD, label=label, zorder=4)
        axes.set_ylim(0, 2.7)
        axes.set_xlabel("chance that the draft's next state is the target's")
        axes.set_ylabel("speed-up")
        axes.legend(frameon=False, loc="upper left")
        where = [f"{result.prompts} prompts", result.environment.device_name, result.environment.date[:10]]
        note_source(figure, 0.09, where)
