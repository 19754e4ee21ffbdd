"""What rollouts cost as a picture: the ratio of the rates by batch, and τ against its break-even."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.bench.rollout.break_even import START
from laguna_serve.bench.rollout.result import LOSES, PAYS, RolloutPoint, RolloutsResult
from laguna_serve.serving.kit.figures import BAD, GOOD, SOFT, note_source, open_figure, style_axes

BAND, LIMIT = "#f3d9c9", BAD
COLORS = {PAYS: GOOD, LOSES: BAD}


def draw(result: RolloutsResult, path: Path) -> None:
    """Write a PNG of speculative ÷ plain rates by batch, and of the acceptance by batch or policy version."""
    with open_figure(path, 1, 2, figsize=(11, 4.8)) as (figure, axes):
        figure.subplots_adjust(left=0.065, right=0.98, top=0.83, bottom=0.21, wspace=0.18)
        _draw_ratios(axes[0], result.points)
        if result.versions:
            names = [point.version or START for point in result.versions]
            _draw_acceptance(axes[1], result.versions, names, "policy version")
        else:
            batches = [str(point.batch) for point in result.points]
            _draw_acceptance(axes[1], result.points, batches, "batch: sequences in flight")
        note_source(figure, 0.065, _describe(result))


def _draw_ratios(axes: Axes, points: Sequence[RolloutPoint]) -> None:
    style_axes(axes, "Speculative ÷ plain tok/s", "95% intervals; orange: slower, grey: inconclusive")
    axes.axhline(1, color=SOFT, linewidth=1, zorder=1)
    for rank, point in enumerate(points):
        ratio, color = point.ratio, COLORS.get(point.verdict, SOFT)
        spread = [[ratio.point - ratio.ci95[0]], [ratio.ci95[1] - ratio.point]]
        axes.errorbar(rank, ratio.point, yerr=spread, fmt="o", color=color, markersize=6, capsize=4, linewidth=1.4)
        label = f"{ratio.point:.2f}×"
        axes.annotate(label, (rank, ratio.point), xytext=(9, 0), textcoords="offset points", va="center", color=color)
    axes.set_xlim(-0.5, len(points) - 0.3)
    axes.set_ylim(0, max(1.1, *(point.ratio.ci95[1] for point in points)) * 1.1)
    axes.set_xticks(range(len(points)), [str(point.batch) for point in points])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("batch: sequences in flight")


def _draw_acceptance(axes: Axes, points: Sequence[RolloutPoint], names: Sequence[str], label: str) -> None:
    at = f", batch {points[0].batch}" if label == "policy version" else ""
    style_axes(
        axes, f"τ against its break-even{at}", "tokens per speculative step; below the band speculation does not pay"
    )
    ranks = list(range(len(points)))
    tau = [(rank, point.acceptance) for rank, point in enumerate(points) if point.acceptance is not None]
    even = [(rank, point.break_even) for rank, point in enumerate(points) if point.break_even is not None]
    if even:
        places, found = [rank for rank, _ in even], [each for _, each in even]
        axes.fill_between(places, [e.ci95[0] for e in found], [e.ci95[1] for e in found], color=BAND, linewidth=0)
        axes.plot(places, [e.point for e in found], color=LIMIT, linewidth=1.4, marker="_", label="break-even τ")
    if tau:
        spread = [[t.length - t.ci95[0] for _, t in tau], [t.ci95[1] - t.length for _, t in tau]]
        places, lengths = [rank for rank, _ in tau], [t.length for _, t in tau]
        axes.errorbar(places, lengths, yerr=spread, fmt="o-", color=GOOD, markersize=6, capsize=4, label="τ")
        axes.legend(frameon=False, loc="lower left", ncols=2)
    axes.set_xlim(-0.5, len(points) - 0.5)
    ends = [t.ci95[1] for _, t in tau] + [e.ci95[1] for _, e in even]
    axes.set_ylim(0, max(ends, default=1) * 1.1)
    many = len(names) > 6 or max(map(len, names)) > 12
    axes.set_xticks(ranks, names, rotation=20 if many else 0, ha="right" if many else "center")
    axes.set_xlabel(label)


def _describe(result: RolloutsResult) -> list[str]:
    work, environment = result.workload, result.environment
    parts = [result.how_many, f"groups of {work.group} × {work.max_tokens} tokens"]
    parts += [f"temperature {work.temperature:g}", f"{work.rounds} rounds"]
    return [*parts, environment.device_name, environment.date[:10]]
