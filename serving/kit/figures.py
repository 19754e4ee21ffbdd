"""One style for all figures: colours, axes without boxes, a title with what is measured, and where figures are from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laguna_serve.serving.kit.files import write_stream

INK, SOFT, FAINT = "#1f2933", "#5f6b78", "#d9dee4"
# Better and worse than the baseline.
GOOD, BAD = "#0b7a75", "#c2410c"


@contextmanager
def open_figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """Open a figure and its axes (as plt.subplots gives them) to draw into; written to `path` as PNG at the end.

    Raises:
        WriteError: it cannot be written; an earlier picture stays.
    """
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(rows, columns, dpi=150, **options)
        try:
            yield figure, axes
            write_stream(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
        finally:
            plt.close(figure)


def style_axes(axes: Axes, title: str, measure: str) -> None:
    """Title, what is measured, a horizontal grid, and no box."""
    axes.text(0, 1.11, title, transform=axes.transAxes, fontweight="bold", fontsize=12)
    axes.text(0, 1.035, measure, transform=axes.transAxes, color=SOFT, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=SOFT, length=0, which="both")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def note_source(figure: Figure, left: float, parts: list[str], bottom: float = 0.03) -> None:
    """Below the axes: the load, the device, the date."""
    figure.text(left, bottom, "  ·  ".join(parts), fontsize=8.5, color=SOFT)
