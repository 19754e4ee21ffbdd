"""The frontier as a picture: added perplexity against bytes, every format in one plane, XS.2's own curve beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from laguna_serve.scripts.frontier.published import left_of_model
from laguna_serve.scripts.frontier.result import FrontierPoint, FrontierResult
from laguna_serve.serving.kit.figures import INK, SOFT, note_source, open_figure, style_axes

# Mask → its name in the legend, colour and marker; single atoms lie on their groups.
LINES = {
    "loss": ("loss, groups", "#0b7a75", "o"),
    "heapr": ("HEAPr, groups", "#2563eb", "s"),
    "output": ("output, groups", "#7c3aed", "D"),
    "magnitude": ("magnitude, groups", "#b7791f", "^"),
    "mone": ("MoNE, whole experts", "#db2777", "P"),
    "reap": ("REAP, groups of experts", "#dc6b4a", "v"),
    "reap-experts": ("REAP, whole experts", "#9a3412", "X"),
    "heapr-repacked": ("HEAPr, repacked", "#60a5fa", "s"),
    "random": ("random groups", "#6b7280", "o"),
}
DASHED = ("heapr-repacked", "random", "reap")
# Points of equal bytes are drawn so far apart that their bars do not cover each other.
APART = 0.0022
# What is drawn of XS.2's published curves.
REFERENCES = {
    "XS.2, HEAPr groups": (INK, "-"),
    "XS.2, repacked": (INK, ":"),
    "XS.2, random groups": (SOFT, "--"),
}
LEAST = 1e-4  # where a loss did not grow: the lower end of a logarithmic axis


def draw_frontier(result: FrontierResult, path: Path) -> None:
    """Write the frontier as a PNG."""
    with open_figure(path, figsize=(9.6, 5.6)) as (figure, axes):
        figure.subplots_adjust(left=0.09, right=0.73, top=0.85, bottom=0.17)
        _draw_points(result, axes)
        _draw_published(result, axes)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, LEAST), 2 * high)  # room for the formats' names
        axes.yaxis.set_major_formatter(lambda value, _: f"+{value:.2%}" if value < 0.01 else f"+{value:.0%}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        first = result.formats[0]
        style_axes(
            axes,
            "What pruning adds to perplexity, against bytes",
            f"over {math.exp(first.loss):.2f} of the unpruned model in {first.format};"
            " bars: 95%, over rows and calibration draws; equal bytes side by side",
        )
        axes.set_xlabel(f"bytes of the whole model, of {first.bytes / 1e6:.2f} MB unpruned in {first.format}")
        lines, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda at: labels[at].startswith("XS.2"))
        axes.legend(
            [lines[at] for at in order],
            [labels[at] for at in order],
            loc="upper left",
            bbox_to_anchor=(1.02, 1.02),
            frameon=False,
            fontsize=9,
            labelspacing=0.7,
        )
        text, drawn = result.text, result.calibration
        counted = f"{text.targets:,} tokens of {text.source}"
        note_source(figure, 0.09, [counted, f"{drawn.draws} draws of {drawn.source}", result.environment.date[:10]])


def _draw_points(result: FrontierResult, axes: Axes) -> None:
    first = result.formats[0]
    for number, stored in enumerate(result.formats):
        # Of the format's rounding, too.
        rounding = stored.loss - first.loss
        sizes = []
        for mask, (label, color, marker) in LINES.items():
            points = sorted(
                (p for p in result.points if (p.mask, p.format) == (mask, stored.format)), key=lambda p: p.ratio
            )
            if not points:
                continue
            places = [point.bytes / first.bytes for point in points]
            sizes += places
            axes.errorbar(
                [place + APART * (list(LINES).index(mask) - len(LINES) // 2) for place in places],
                [_grow(point.delta + rounding) for point in points],
                yerr=_bars(points, rounding),
                label=label if number == 0 else None,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                linestyle="--" if mask in DASHED else "-",
                elinewidth=0.8,
                alpha=0.9,
            )
        axes.annotate(
            stored.format,
            ((min(sizes) + max(sizes)) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            color=SOFT,
            fontsize=11,
            fontweight="bold",
        )


def _draw_published(result: FrontierResult, axes: Axes) -> None:
    for curve in result.published:
        if curve.name not in REFERENCES:
            continue
        color, style = REFERENCES[curve.name]
        axes.plot(
            [left_of_model(share) for share in curve.shares],
            [ratio - 1 for ratio in curve.perplexities],
            color=color,
            linestyle=style,
            linewidth=1.2,
            marker=".",
            markersize=6,
            label=f"{curve.name}\n(published, bf16)",
        )


def _grow(delta: float) -> float:
    """Turn added nats into added perplexity, at least what the axis shows."""
    return max(math.expm1(delta), LEAST)


def _bars(points: Sequence[FrontierPoint], rounding: float) -> list[list[float]]:
    middle = [_grow(point.delta + rounding) for point in points]
    low = [value - _grow(point.low + rounding) for value, point in zip(middle, points, strict=True)]
    high = [_grow(point.high + rounding) - value for value, point in zip(middle, points, strict=True)]
    return [[max(value, 0) for value in low], [max(value, 0) for value in high]]
