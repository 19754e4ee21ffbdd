"""The pictures: box plots of scores, pruned shares by layer, benchmarks by share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from laguna_serve.scripts.insights.artefacts import ArtefactInsights
from laguna_serve.scripts.insights.sensitivity import SuiteCurve
from laguna_serve.serving.kit.figures import FAINT, INK, SOFT, note_source, open_figure, style_axes

BOX, MEDIAN = "#99c7c4", "#0b7a75"
SHARES = ("#7fb8b5", "#0b7a75", "#c2410c", "#7c2d12", "#2563eb", "#7c3aed")
CURVES = ("#0b7a75", "#c2410c", "#2563eb", "#7c3aed", "#b7791f", "#db2777", "#0891b2", "#4d7c0f")
# More layers than this and not every one has its number below it.
NUMBERED = 24


def draw_scores(insights: ArtefactInsights, path: Path) -> None:
    """Write a box for every layer: quartiles, and whiskers to the 5 and 95% quantiles of log10 of the scores."""
    with open_figure(path, figsize=(9.6, 4.6)) as (figure, axes):
        figure.subplots_adjust(left=0.08, right=0.97, top=0.82, bottom=0.2)
        scored = [layer for layer in insights.layers if layer.quantiles]
        boxes = [
            {"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high, "fliers": []}
            for low, first, median, third, high in (layer.quantiles for layer in scored)
        ]
        axes.bxp(
            boxes,
            positions=[layer.layer for layer in scored],
            widths=0.62,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": BOX, "edgecolor": MEDIAN, "linewidth": 0.8},
            medianprops={"color": INK, "linewidth": 1.4},
            whiskerprops={"color": MEDIAN, "linewidth": 0.8},
            capprops={"color": MEDIAN, "linewidth": 0.8},
        )
        name = f"`{insights.score}`" if insights.score else "the atoms' scores"
        style_axes(
            axes,
            "How important the atoms of each layer are",
            f"log10 of {name}: quartiles, whiskers to the 5 and 95% quantiles; negative is below 1",
        )
        _mark_layers(axes, [layer.layer for layer in insights.layers])
        unscored = np.mean([layer.unscored for layer in insights.layers])
        parts = [f"{insights.atoms:,} atoms"]
        if insights.fall is not None and len(insights.layers) > 2:
            way = "below" if insights.fall >= 0 else "above"
            parts.append(f"median of the last third {abs(insights.fall):.2f} orders of magnitude {way} the first's")
        if unscored:
            share = f"{unscored:.1%}" if unscored >= 0.001 else "fewer than 0.1%"
            parts.append(f"{share} score 0 and are left out")
        note_source(figure, 0.08, parts)


def draw_shares(insights: ArtefactInsights, path: Path) -> None:
    """Write bars of every layer's pruned groups, mask by mask, with the masks' shares of all groups as lines."""
    with open_figure(path, figsize=(9.6, 4.6)) as (figure, axes):
        figure.subplots_adjust(left=0.08, right=0.86, top=0.82, bottom=0.2)
        layers = [layer.layer for layer in insights.layers]
        width = 0.8 / len(insights.ratios)
        for at, ratio in enumerate(insights.ratios):
            color = SHARES[at % len(SHARES)]
            places = [layer + (at - (len(insights.ratios) - 1) / 2) * width for layer in layers]
            shares = [layer.pruned[at] for layer in insights.layers]
            axes.bar(places, shares, width=width * 0.92, color=color, label=f"{ratio:.0%} of all")
            axes.axhline(ratio, color=color, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        style_axes(axes, "Which layers the groups are pruned from", "share of a layer's groups; dotted: of all groups")
        _mark_layers(axes, layers)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
        note_source(figure, 0.08, [f"{insights.groups:,} groups of {len(layers)} sparse layers"])


def draw_suites(curves: Sequence[SuiteCurve], path: Path) -> None:
    """Write every suite's curve, with the intervals of its points."""
    with open_figure(path, figsize=(9.6, 5)) as (figure, axes):
        figure.subplots_adjust(left=0.08, right=0.66, top=0.84, bottom=0.18)
        for at, curve in enumerate(curves):
            color = CURVES[at % len(CURVES)]
            # Side by side, so that bars of the same share do not cover each other.
            ratios = [point.ratio + (at - (len(curves) - 1) / 2) * 0.002 for point in curve.points]
            axes.errorbar(
                ratios,
                [point.value for point in curve.points],
                yerr=_bars(curve),
                color=color,
                marker="o",
                markersize=4,
                linewidth=1.6,
                linestyle="-" if at < len(CURVES) else "--",
                elinewidth=0.8,
                label=_name(curve),
            )
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low), min(1.0, high))
        axes.set_xticks(sorted({point.ratio for curve in curves for point in curve.points}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        style_axes(axes, "What pruning costs on benchmarks", "share that is right; bars: 95% intervals over questions")
        axes.set_xlabel("groups pruned")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, fontsize=8.5, labelspacing=0.8)
        differ = sorted({name for curve in curves for name in curve.differ})
        note_source(figure, 0.08, [f"† not measured alike: {', '.join(differ)} differ"] if differ else [])


def _name(curve: SuiteCurve) -> str:
    numbers = {point.n for point in curve.points}
    count = f"n {min(numbers):,}" if len(numbers) == 1 else f"n {min(numbers):,} to {max(numbers):,}"
    return f"{curve.suite}{' †' if curve.differ else ''}\n{curve.metric}, {count}"


def _bars(curve: SuiteCurve) -> list[list[float]]:
    intervals = [point.ci95 or (point.value, point.value) for point in curve.points]
    low = [max(0.0, point.value - interval[0]) for point, interval in zip(curve.points, intervals, strict=True)]
    high = [max(0.0, interval[1] - point.value) for point, interval in zip(curve.points, intervals, strict=True)]
    return [low, high]


def _mark_layers(axes: Axes, layers: Sequence[int]) -> None:
    step = -(-len(layers) // NUMBERED)
    axes.set_xticks(layers[::step], [str(layer) for layer in layers[::step]])
    axes.set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    axes.set_xlabel("layer", color=SOFT)
    axes.spines["bottom"].set_color(FAINT)
