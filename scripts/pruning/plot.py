"""The loss curve as a picture: ranked masks against random ones."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK, SOFT, FAINT = "#1f2933", "#5f6b78", "#d9dee4"
RANKED, RANDOM = "#0b7a75", "#c2410c"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG: what pruning adds to the loss, with every random draw as a dot."""
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(figsize=(7.5, 4.8), dpi=150)
        figure.subplots_adjust(left=0.1, right=0.87, top=0.84, bottom=0.2)
        _draw_curves(axes, result)
        text, environment = result["text"], result["environment"]
        parts = [
            f"{text['targets']:,} tokens of {text['source']}",
            f"{len(result['points'][0]['random'])} random seeds",
        ]
        figure.text(0.1, 0.035, "  ·  ".join([*parts, environment["date"][:10]]), fontsize=8.5, color=SOFT)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _draw_curves(axes: Axes, result: dict[str, Any]) -> None:
    base, points = result["unpruned"], result["points"]
    ratios = [0.0, *(point["ratio"] for point in points)]
    ranked = [0.0, *(point["ranked"] - base for point in points)]
    means = [0.0, *(statistics.mean(point["random"]) - base for point in points)]
    for point in points:
        draws = [loss - base for loss in point["random"]]
        axes.scatter([point["ratio"]] * len(draws), draws, s=16, color=RANDOM, alpha=0.45, linewidths=0, zorder=3)
    for values, color, label in ((means, RANDOM, "random\n(mean)"), (ranked, RANKED, "ranked")):
        axes.plot(ratios, values, color=color, linewidth=1.8, marker="o", markersize=4, zorder=4)
        axes.annotate(
            label, (ratios[-1], values[-1]), xytext=(9, 0), textcoords="offset points", color=color, va="center"
        )
    axes.text(
        0, 1.1, "What pruning adds to the held-out loss", transform=axes.transAxes, fontweight="bold", fontsize=12
    )
    found = f"nats per token, above {base:.4f} unpruned; every dot is one random mask"
    axes.text(0, 1.035, found, transform=axes.transAxes, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=SOFT, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)
    axes.set_xticks(ratios)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.2f}" if value else "0")
    axes.set_xlabel("groups pruned")
