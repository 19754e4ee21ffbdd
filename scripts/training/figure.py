"""The frame that the curves share: title, measure, axes without boxes, and where the figures come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.serving.kit.figures import note_source, open_figure, style_axes


def draw_figure(
    path: Path, title: str, measure: str, source: str, curves: Callable[[Axes], None], along: str = "step"
) -> None:
    """Write a PNG: `curves` draws into the axes, with `along` to the right.

    `measure` says what is drawn, `source` of what.
    """
    with open_figure(path, figsize=(7.5, 4.2)) as (figure, axes):
        figure.subplots_adjust(left=0.1, right=0.84, top=0.83, bottom=0.19)
        curves(axes)
        style_axes(axes, title, measure)
        axes.set_xlabel(along)
        axes.set_xlim(left=0)
        note_source(figure, 0.1, [source])
