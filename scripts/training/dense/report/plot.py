"""The distillation as pictures: NMSE per layer in stage 1, KL per step in stage 2, and what was held out there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.serving.kit.figures import BAD, SOFT, note_source, open_figure, style_axes

LINE = "#0b7a75"
CURVES = (
    ("kl", "KL", LINE),
    ("entropy_student", "student's entropy", BAD),
    ("entropy_teacher", "teacher's entropy", SOFT),
)
LAYER_COLORS = "viridis"
MAX_LABELS, LABEL_ROWS = 8, 20
# An axis of less than this has a label at every digit: 2 and 5 alone may both be outside.
DECADE = 6


def draw_blocks(log: Sequence[Mapping[str, float]], path: Path, source: str) -> None:
    """Stage 1: a line per layer, its last value beside it."""
    layers = [key for key in log[-1] if key.startswith("layer ")]
    colors = mpl.colormaps[LAYER_COLORS]

    def curves(axes: Axes) -> None:
        ends = [log[-1][key] for key in layers]
        for number, key in enumerate(layers):
            color = colors(0.85 * number / max(1, len(layers) - 1))
            axes.plot([r["step"] for r in log], [r[key] for r in log], color=color, linewidth=1.2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        shown = "25" if high / low > DECADE else "123456789"
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else "")
        if len(layers) <= MAX_LABELS:
            places = _spread(ends, ratio=(high / low) ** (1 / LABEL_ROWS))
            for number, (key, at) in enumerate(zip(layers, places, strict=True)):
                color = colors(0.85 * number / max(1, len(layers) - 1))
                label = f"{key}: {log[-1][key]:.3f}"
                axes.annotate(label, (1.01, at), xycoords=("axes fraction", "data"), color=color, va="center", size=8.5)

    title = "Stage 1: every dense block learns its sparse block's output"
    draw_figure(path, title, "‖student − teacher‖² ÷ ‖teacher‖², per layer", source, curves)


def draw_student(log: Sequence[Mapping[str, float]], path: Path, source: str) -> None:
    """Stage 2: the KL, each point the mean over the steps of a record."""

    def curves(axes: Axes) -> None:
        steps, values = [r["step"] for r in log], [r["loss"] for r in log]
        axes.plot(steps, values, color=LINE, linewidth=1.4)
        axes.annotate(
            f"{values[-1]:.3f}", (1.01, values[-1]), xycoords=("axes fraction", "data"), color=LINE, va="center"
        )
        axes.set_ylim(bottom=0)

    title = "Stage 2: the whole student learns the teacher's distribution"
    draw_figure(path, title, "KL(teacher ‖ student), nats per assistant token", source, curves)


def draw_curve(points: Sequence[Mapping[str, float]], path: Path, source: str) -> None:
    """Stage 2 on what is held out: KL and entropy in nats, and below them the share of answers that stop."""
    steps = [point["step"] for point in points]
    with open_figure(path, rows=2, figsize=(7.5, 5.6), sharex=True, height_ratios=(3, 2)) as (figure, (upper, lower)):
        figure.subplots_adjust(left=0.1, right=0.8, top=0.87, bottom=0.14, hspace=0.22)
        for name, label, color in CURVES:
            values = [point[name] for point in points]
            upper.plot(steps, values, color=color, linewidth=1.4)
            text = f"{label}: {values[-1]:.3f}"
            upper.annotate(
                text, (1.01, values[-1]), xycoords=("axes fraction", "data"), color=color, va="center", size=8.5
            )
        upper.set_ylim(bottom=0)
        style_axes(upper, "Stage 2 on held-out conversations", "nats per assistant token")
        stops = [point["stops"] for point in points]
        lower.plot(steps, stops, color=LINE, linewidth=1.4)
        lower.annotate(
            f"{stops[-1]:.2f}", (1.01, stops[-1]), xycoords=("axes fraction", "data"), color=LINE, va="center"
        )
        lower.set_ylim(0, 1.02)
        style_axes(lower, "", "greedy answers to held-out requests that stop, share")
        lower.set_xlabel("step")
        note_source(figure, 0.1, [source])


def _spread(values: list[float], ratio: float) -> list[float]:
    """Places for labels on a logarithmic axis: the values, pushed apart to at least this ratio."""
    places = list(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    for before, after in pairwise(order):
        places[after] = max(places[after], places[before] * ratio)
    return places
