"""The frame that the curves share: title, measure, axes without boxes, and where the figures come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK, SOFT, FAINT = "#1f2933", "#5f6b78", "#d9dee4"


def draw_figure(
    path: Path, title: str, measure: str, source: str, curves: Callable[[Axes], None], along: str = "step"
) -> None:
    """Write a PNG: `curves` draws into the axes, with `along` to the right; `measure` says what is drawn, `source` of
    what."""
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=150)
        figure.subplots_adjust(left=0.1, right=0.84, top=0.83, bottom=0.19)
        curves(axes)
        axes.text(0, 1.11, title, transform=axes.transAxes, fontweight="bold", fontsize=12)
        axes.text(0, 1.035, measure, transform=axes.transAxes, color=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=SOFT, length=0, which="both")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(along)
        axes.set_xlim(left=0)
        figure.text(0.1, 0.03, source, fontsize=8.5, color=SOFT)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
