"""A pruning curve as a picture: what ranked and random masks add to the loss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.evals.perplexity.pruning_report import PruningResult
from laguna_serve.serving.kit.figures import BAD, GOOD, note_source, open_figure, style_axes

RANKED, RANDOM = GOOD, BAD


def draw_curves(result: PruningResult, path: Path) -> None:
    """Write a PNG of the loss over the share of pruned groups."""
    base, points = result.unpruned.nats_per_token, result.points
    measure = f"nats per token above {base:.4f} unpruned; dots: random masks, bars: 95% intervals of ranked ones"
    with open_figure(path, figsize=(7.5, 4.2)) as (figure, axes):
        figure.subplots_adjust(left=0.1, right=0.84, top=0.83, bottom=0.19)
        for point in points:
            if (interval := point.ranked_delta.ci95) is not None:
                axes.vlines(point.share, *interval, color=RANKED, linewidth=5, alpha=0.25, zorder=2)
        random = [[loss - base for loss in point.random] for point in points]
        ranked = [point.ranked_delta.nats_per_token for point in points]
        draw_added_loss(axes, [point.share for point in points], ranked, random)
        style_axes(axes, "What pruning adds to the loss", measure)
        axes.set_xlim(left=0)
        axes.set_xlabel("groups pruned")
        data, environment = result.data, result.environment
        parts = [f"{data.scored_tokens:,} tokens of {data.source}", f"random masks per share: {result.seeds}"]
        parts += [f"{result.dtype}, through vLLM", environment.date[:10]]
        note_source(figure, 0.1, parts)


def draw_added_loss(
    axes: Axes, shares: Sequence[float], ranked: Sequence[float], random: Sequence[Sequence[float]]
) -> None:
    """Draw what masks add to the loss at every share: the ranked one's curve, and every random one as a dot."""
    for share, draws in zip(shares, random, strict=True):
        axes.scatter([share] * len(draws), draws, s=16, color=RANDOM, alpha=0.45, linewidths=0, zorder=3)
    along = [0.0, *shares]
    means = [0.0, *map(statistics.mean, random)]
    for values, color, label in ((means, RANDOM, "random\n(mean)"), ([0.0, *ranked], RANKED, "ranked")):
        axes.plot(along, values, color=color, linewidth=1.8, marker="o", markersize=4, zorder=4)
        place = (along[-1], values[-1])
        axes.annotate(label, place, xytext=(9, 0), textcoords="offset points", color=color, va="center")
    axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
    axes.set_xticks(along)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.2f}" if value else "0")
