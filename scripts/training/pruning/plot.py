"""The loss curve as a picture: ranked masks against random ones."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.scripts.training.pruning.curve import CurveResult

RANKED, RANDOM = "#0b7a75", "#c2410c"


def draw_curve(result: CurveResult, path: Path) -> None:
    """Write the PNG: what pruning adds to the loss, with every random draw as a dot."""
    text, seeds = result.text, len(result.points[0].random)
    date = result.environment.date[:10]
    source = f"{text.targets:,} tokens of {text.source}  ·  {seeds} random seeds  ·  {date}"
    measure = f"nats per token, above {result.unpruned:.4f} unpruned; every dot is one random mask"
    title = "What pruning adds to the held-out loss"
    draw_figure(path, title, measure, source, partial(_draw_curves, result), along="groups pruned")


def _draw_curves(result: CurveResult, axes: Axes) -> None:
    base, points = result.unpruned, result.points
    ratios = [0.0, *(point.ratio for point in points)]
    ranked = [0.0, *(point.ranked - base for point in points)]
    means = [0.0, *(statistics.mean(point.random) - base for point in points)]
    for point in points:
        draws = [loss - base for loss in point.random]
        axes.scatter([point.ratio] * len(draws), draws, s=16, color=RANDOM, alpha=0.45, linewidths=0, zorder=3)
    for values, color, label in ((means, RANDOM, "random\n(mean)"), (ranked, RANKED, "ranked")):
        axes.plot(ratios, values, color=color, linewidth=1.8, marker="o", markersize=4, zorder=4)
        axes.annotate(
            label, (ratios[-1], values[-1]), xytext=(9, 0), textcoords="offset points", color=color, va="center"
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(ratios)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.2f}" if value else "0")
