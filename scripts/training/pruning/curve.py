"""The result of pruning_curve.py: held-out losses of ranked masks and of random ones of the same size, and its page."""

from __future__ import annotations

import statistics

import msgspec

from laguna_serve.serving.kit.environment import Environment, cite_environment
from laguna_serve.serving.kit.tables import Table


class CurveModel(msgspec.Struct, frozen=True, kw_only=True):
    """Whose experts were pruned, and by which groups."""

    name: str
    indices_sha256: str


class CurveText(msgspec.Struct, frozen=True, kw_only=True):
    """What the losses were measured on; `targets`: predicted tokens."""

    source: str
    documents: int
    rows: int
    targets: int


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Losses at one share of pruned groups, in nats: of the ranked mask, and of a random one per seed."""

    ratio: float
    pruned_groups: int
    groups: int
    ranked: float
    random: tuple[float, ...]
    ranked_mask_sha256: str


class CurveResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_loss/1"):
    """Losses in nats per token; `unpruned`: of the whole model."""

    environment: Environment
    model: CurveModel
    text: CurveText
    unpruned: float
    points: tuple[CurvePoint, ...]


HEADS = (
    *("groups pruned", "ranked, nats", "Δ", "random, mean ± s.d.", "Δ", "random, least to most"),
    "ranked Δ ÷ random Δ",
)


def format_table(result: CurveResult) -> str:
    """Format a Markdown page: a row per share of pruned groups, and how it was measured."""
    base, text = result.unpruned, result.text
    lines = [
        "# Held-out loss of the pruned toy teacher" if text.source == "toy:held-out" else "# Held-out loss, pruned",
        "",
    ]
    rows = [("0%", f"{base:.4f}", "", f"{base:.4f}", "", "", "")]
    for point in result.points:
        mean, spread = statistics.mean(point.random), statistics.stdev(point.random)
        ranked_delta, random_delta = point.ranked - base, mean - base
        share = f"{point.pruned_groups} of {point.groups} ({point.ratio:.0%})"
        drawn = (f"{mean:.4f} ± {spread:.4f}", f"{random_delta:+.4f}")
        ends = f"{min(point.random):.4f} to {max(point.random):.4f}"
        ratio = f"{ranked_delta / random_delta:.2f}"
        rows.append((share, f"{point.ranked:.4f}", f"{ranked_delta:+.4f}", *drawn, ends, ratio))
    unseen = ", which neither training nor calibration saw" if text.source == "toy:held-out" else ""
    seeds = len(result.points[0].random)
    lines += [
        Table("lrrrrrr", HEADS, rows).to_markdown(),
        "",
        f"Mean next-token loss over {text.targets:,} tokens of {text.source} ({text.documents} documents,"
        f" {text.rows} evenly spaced rows){unseen}. Random masks: {seeds} seeds, the same groups, as many pruned, at"
        " least one kept in every expert. fp32, pruned atoms zeroed in transformers.",
        "",
        cite_environment(result.environment),
    ]
    return "\n".join(lines) + "\n"
