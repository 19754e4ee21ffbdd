"""The result of bench/diffusion in words: rows per proposer and load, per draft in fewer bits, and per reference."""

from __future__ import annotations

from laguna_serve.bench.diffusion.result import DiffusionResult, ProposerPoint
from laguna_serve.bench.stats.intervals import NO_INTERVAL, Interval
from laguna_serve.serving.kit.tables import INTERRUPTED_RUN, Table


def count_differing(result: DiffusionResult) -> int:
    """Count answers that are not the reference's."""
    points = [*result.points, *(point for draft in result.drafts for point in draft.points)]
    return sum(point.differing for point in points)


def render_text(result: DiffusionResult) -> str:
    """Render a row per proposer and concurrency, then one per reference."""
    rows = [
        [
            str(point.concurrency),
            point.proposer,
            f"{point.steps_per_pass:.2f} ({_show_interval(point.steps_per_pass_ci95)})",
            f"{point.accepted:.0%}",
            f"{point.tokens_per_s:.0f}",
            f"{point.speedup:.2f}× ({_show_interval(point.speedup_ci95)})",
            str(point.differing),
        ]
        for point in result.points
    ]
    heads = ("at once", "proposals", "steps per pass (95%)", "accepted", "tok/s", "speed-up (95%)", "differ")
    lines = [
        f"{result.model}: {result.prompts} prompts, canvas {result.canvas} in blocks of {result.block}, schedule "
        f"{result.schedule}, cache {result.cache}, {result.states} states proposed per request and pass",
        "",
        Table("rlrrrrr", heads, rows).to_text(),
    ]
    if result.next_commits is not None and result.cost is not None:
        place, state = result.next_commits
        lines += [
            "",
            f"the draft knows the next position in {place:.0%} and the next state in {state:.0%} of the steps; its "
            f"pass costs {result.cost:.2f} of the target's by the bytes read",
        ]
    if result.drafts:
        lines += ["", "The draft in fewer bits, one request at a time:", "", _tabulate_drafts(result).to_text()]
    if result.references:
        shown = [
            [at.schedule, at.cache, str(at.steps), f"{at.tokens_per_s:.0f}", f"{at.agreement:.1%}"]
            for at in result.references
        ]
        others = Table("rlrrr", ("schedule", "cache", "steps", "tok/s", "tokens as with 1, none"), shown)
        lines += ["", "Other references, other texts:", "", others.to_text()]
    if result.partial:
        lines += ["", INTERRUPTED_RUN]
    return "\n".join(lines)


def _tabulate_drafts(result: DiffusionResult) -> Table:
    rows = [
        [
            draft.weights,
            f"{draft.cost:.2f}",
            f"{draft.next_commits[1]:.0%}",
            point.proposer,
            f"{point.steps_per_pass:.2f} ({_show_interval(point.steps_per_pass_ci95)})",
            f"{point.speedup:.2f}× ({_show_interval(point.speedup_ci95)})",
            str(point.differing),
        ]
        for draft in result.drafts
        for point in draft.points
    ]
    heads = ("weights", "cost", "next state", "proposals", "steps per pass (95%)", "speed-up (95%)", "differ")
    return Table("lrrlrrr", heads, rows)


def summarise(point: ProposerPoint) -> str:
    """Sum a point up in a few words."""
    differing = f", {point.differing} DIFFER" if point.differing else ""
    return f"{point.steps_per_pass:.2f} steps per pass, {point.speedup:.2f}×{differing}"


def _show_interval(interval: Interval | None) -> str:
    return f"– {NO_INTERVAL}" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}"
