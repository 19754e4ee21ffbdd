"""The kernel benchmark as a picture: microseconds against the bandwidth floor, and the ratio to vLLM's kernel."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from msgspec import UNSET

from laguna_serve.bench.moe_layer.result import MoeResult, MoeRow
from laguna_serve.serving.kit.figures import SOFT, note_source, open_figure, style_axes

# The least ratio of two numbers whose labels do not touch, up to 1,024.
CLOSEST = 1.4
SHADES = ("#12355b", "#1f6f9f", "#0b7a75", "#c2410c", "#7a5195", "#5f6b78")


def draw(result: MoeResult, path: Path) -> None:
    """Write the PNG: a row of two panels for each routing and kind of weights."""
    kinds = list(dict.fromkeys((row.routing, row.kind) for row in result.rows))
    size = (11, 0.9 + 4 * len(kinds))
    with open_figure(path, len(kinds), 2, figsize=size, squeeze=False) as (figure, axes):
        for (left, right), (routing, weights) in zip(axes, kinds, strict=True):
            same = [row for row in result.rows if (row.routing, row.kind) == (routing, weights)]
            rows = [row for row in same if not row.refused]
            kind = "weights in 8 bits; " if weights == "fp8" else ""
            if rows:
                _draw_times(left, rows, routing, kind)
                _draw_ratio(right, rows, routing, kind)
            else:
                left.text(0.5, 0.5, "every row was refused", transform=left.transAxes, ha="center", color=SOFT)
        settings, environment = result.settings, result.environment
        about = f"{settings.experts} experts × {settings.intermediate}, hidden {settings.hidden}, top-{settings.topk}"
        device = environment.cpu or "unknown" if settings.device == "cpu" else settings.device
        floor = f"floor {result.bandwidth_gb_s['floor']:.1f} GB/s"
        figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1), w_pad=2.5, h_pad=2)
        parts = [f"{about}, {settings.dtype}", device, floor, environment.date[:10]]
        note_source(figure, 0.02, parts, bottom=0.12 / figure.get_figheight())


def _draw_times(axes: Axes, rows: list[MoeRow], routing: str, kind: str) -> None:
    for shade, pruning in zip(SHADES, sorted({row.pruning for row in rows}), strict=False):
        points = [(row.tokens, row.us, row.floor_us) for row in rows if row.pruning == pruning]
        timed = [(tokens, us, floor) for tokens, us, floor in points if us is not UNSET and floor is not UNSET]
        tokens = [count for count, _, _ in timed]
        axes.plot(tokens, [us for _, us, _ in timed], marker="o", ms=4, color=shade, label=f"{pruning:.0%} pruned")
        axes.plot(tokens, [floor for _, _, floor in timed], ls=":", lw=1.2, color=shade)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs per layer")
    _style(axes, rows, f"Time, {routing} routing", f"{kind}dotted: the floor, reading the same bytes")
    axes.legend(frameon=False, fontsize=8.5)


def _draw_ratio(axes: Axes, rows: list[MoeRow], routing: str, kind: str) -> None:
    compared = [(row, row.ratio, row.ratio_ci95) for row in rows if row.ratio and row.ratio_ci95]
    for shade, pruning in zip(SHADES, sorted({row.pruning for row in rows}), strict=False):
        points = [point for point in compared if point[0].pruning == pruning]
        tokens, ratios = [row.tokens for row, _, _ in points], [ratio for _, ratio, _ in points]
        spread = [[ratio - ends[0] for _, ratio, ends in points], [ends[1] - ratio for _, ratio, ends in points]]
        axes.errorbar(tokens, ratios, yerr=spread, marker="o", ms=4, capsize=2, lw=1.2, color=shade)
    axes.axhline(1.0, color=SOFT, lw=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="time ÷ vLLM's", ylim=(0, None))
    note = f"{kind}on the zeroed weights; bars: 95% intervals"
    _style(axes, rows, f"Against vLLM's fused MoE, {routing} routing", note)
    if not compared:
        axes.text(0.5, 0.5, "vLLM's kernel was not measured", transform=axes.transAxes, ha="center", color=SOFT)


def label_apart(tokens: list[int]) -> list[str]:
    """Label rising numbers on an axis by powers; one that would stand on the label before it has none."""
    labels, last = list[str](), 0.0
    for count in tokens:
        apart = count >= CLOSEST * last
        labels.append(str(count) if apart else "")
        last = count if apart else last
    return labels


def _style(axes: Axes, rows: list[MoeRow], title: str, note: str) -> None:
    tokens = sorted({row.tokens for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(label_apart(tokens))
    style_axes(axes, title, note)
