"""A γ sweep as a picture: measured speed-ups with their intervals, predicted ones as lines, per concurrency."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.bench.gamma.result import SweepResult
from laguna_serve.bench.harness.prompts import describe_load
from laguna_serve.serving.kit.figures import SOFT, note_source, open_figure, style_axes

COLORS = ("#0b7a75", "#c2410c", "#4c51bf", "#b7791f", "#702459", "#2f855a")


def draw(result: SweepResult, path: Path) -> None:
    """Write a PNG of tok/s ÷ plain decoding's over γ, a line per concurrency."""
    with open_figure(path, figsize=(7.5, 4.4)) as (figure, axes):
        figure.subplots_adjust(left=0.09, right=0.82, top=0.83, bottom=0.19)
        _draw_points(axes, result)
        work, environment = result.workload, result.environment
        parts = [describe_load(work.num_prompts, work.max_tokens, work.own_lengths), environment.device_name]
        note_source(figure, 0.09, [*parts, environment.date[:10]])


def _draw_points(axes: Axes, result: SweepResult) -> None:
    chosen = {choice.concurrency: choice.gamma for choice in result.choices}
    for color, concurrency in zip(COLORS * 4, chosen, strict=False):
        points = [point for point in result.points if point.concurrency == concurrency]
        gammas, speedups = [p.gamma for p in points], [p.speedup for p in points]
        spread = [[p.speedup - p.ci95[0] for p in points], [p.ci95[1] - p.speedup for p in points]]
        axes.errorbar(gammas, speedups, yerr=spread, fmt="o", color=color, markersize=4.5, capsize=2.5, linewidth=1.1)
        axes.plot(gammas, [p.predicted for p in points], color=color, linewidth=1.4, alpha=0.6)
        beyond = [p for p in points if p.beyond_block]
        hollow = axes.scatter([p.gamma for p in beyond], [p.speedup for p in beyond], s=26, zorder=3)
        hollow.set(facecolors="white", edgecolors=color, linewidths=1.3)
        best = [p for p in points if p.gamma == chosen[concurrency]]
        axes.scatter([p.gamma for p in best], [p.speedup for p in best], s=110, facecolors="none", edgecolors=color)
        label = f"{concurrency} at once\nγ {chosen[concurrency] or '–'}"
        axes.annotate(
            label, (1.015, speedups[-1]), xycoords=("axes fraction", "data"), color=color, va="center", size=9
        )
    _draw_adaptive(axes, result, dict(zip(chosen, COLORS * 4, strict=False)))
    axes.axhline(1, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    measure = "tok/s ÷ plain decoding's, 95% intervals; lines: predicted from τ and the cost of a step; circles: chosen"
    style_axes(axes, "What γ brings", measure)
    gammas = sorted({point.gamma for point in result.points})
    axes.set_xticks([*gammas, *([gammas[-1] + 1] if result.adaptive else [])])
    axes.set_xticklabels([*map(str, gammas), *(["adaptive"] if result.adaptive else [])])
    key = "; hollow: beyond the drafter's block" if any(point.beyond_block for point in result.points) else ""
    axes.set_xlabel(f"γ, tokens drafted per step{key}")


def _draw_adaptive(axes: Axes, result: SweepResult, colors: dict[int, str]) -> None:
    """Draw a diamond per concurrency, right of the last γ."""
    place = max(point.gamma for point in result.points) + 1
    for point in result.adaptive or []:
        spread = [[point.speedup - point.ci95[0]], [point.ci95[1] - point.speedup]]
        color = colors[point.concurrency]
        axes.errorbar([place], [point.speedup], yerr=spread, fmt="D", color=color, markersize=5.5, capsize=2.5)
