"""The result as a picture: speedup per prompt with the pooled ratio and its interval, and acceptance per position."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from laguna_serve.bench.harness.prompts import describe_load, describe_rounds
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.serving.kit.figures import BAD, GOOD, SOFT, note_source, open_figure, style_axes

STEM, BAND, BARS = "#c3ccd5", "#bfe3e0", "#3d6fb4"
REFUSED = "refused: the reasons are in the table"


def draw(result: AbResult, path: Path) -> None:
    """Write the PNG. Figures that were withheld are said to be, not drawn."""
    with open_figure(path, 1, 2, figsize=(11, 5), width_ratios=[2, 1]) as (figure, axes):
        figure.subplots_adjust(left=0.065, right=0.98, top=0.85, bottom=0.19, wspace=0.17)
        _draw_speedup(axes[0], result)
        _draw_acceptance(axes[1], result)
        note_source(figure, 0.065, _describe(result))


def _describe(result: AbResult) -> list[str]:
    work, environment = result.workload, result.environment
    parts = [
        describe_load(work.prompts, work.max_tokens, work.own_lengths),
        f"concurrency {work.concurrency}{describe_rounds(work.waves, work.num_warmups)}",
        "greedy",
    ]
    parts += [environment.device_name, environment.date[:10], *(["PARTIAL RUN"] if result.partial else [])]
    return parts


def _draw_speedup(axes: Axes, result: AbResult) -> None:
    speedup = result.speedup
    unit = result.workload.unit
    if speedup.point is None:
        style_axes(axes, f"Speedup per {unit}", "")
        _say(axes, REFUSED)
        return
    if speedup.ci95:
        low, high = speedup.ci95
        caption = f"pooled {speedup.point:.2f}× (line), 95% interval {low:.2f}–{high:.2f} (band)"
        axes.axhspan(low, high, color=BAND, linewidth=0, zorder=0)
    else:
        caption = f"pooled {speedup.point:.2f}× (line), interval refused"
    style_axes(axes, f"Speedup per {unit}", caption)
    ratios = sorted(item.speedup for item in speedup.per_round if item.speedup is not None)
    ranks = range(1, len(ratios) + 1)
    size = max(5.0, min(28.0, 1500 / len(ratios)))
    axes.axhline(1.0, color=SOFT, linewidth=1, zorder=2)
    axes.axhline(speedup.point, color=GOOD if speedup.point >= 1 else BAD, linewidth=1.5, zorder=3)
    axes.vlines(ranks, 1.0, ratios, color=STEM, linewidth=min(1.2, 80 / len(ratios)), zorder=1)
    axes.scatter(ranks, ratios, s=size, color=[GOOD if ratio >= 1 else BAD for ratio in ratios], zorder=4)
    axes.set_ylim(0, max(1.1, *ratios) * 1.08)
    axes.set_xlim(0.5 - 0.01 * len(ratios), 0.5 + 1.01 * len(ratios))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel(f"{unit}s, from least to most gain")
    axes.set_ylabel("candidate tok/s ÷ baseline tok/s")


def _draw_acceptance(axes: Axes, result: AbResult) -> None:
    acceptance = result.acceptance
    title = "Accepted drafts by position"
    if not acceptance.per_position:
        refused = any(item.figure == "acceptance" for item in result.refused)
        style_axes(axes, title, "")
        _say(axes, REFUSED if refused else "the candidate drafted nothing")
        return
    style_axes(axes, title, f"{acceptance.length:.2f} tokens per step")
    ranks = range(1, len(acceptance.per_position) + 1)
    axes.bar(ranks, acceptance.per_position, width=0.68, color=BARS)
    for rank, share in zip(ranks, acceptance.per_position, strict=True):
        axes.annotate(f"{share:.0%}", (rank, share), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_ylim(0, 1.04)
    axes.set_xticks(list(ranks))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share of drafts that got this far")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=SOFT)
    axes.set_xticks([])
    axes.set_yticks([])
