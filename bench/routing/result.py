"""The result of bench/routing, schema laguna_serve.routing/1."""

from __future__ import annotations

from pathlib import Path

import msgspec

from laguna_serve.serving.kit.environment import Environment, cite_environment
from laguna_serve.serving.kit.figures import BAD, GOOD, SOFT, note_source, open_figure, style_axes
from laguna_serve.serving.kit.tables import Table

COLOURS = {
    "random": "#8a6d3b",
    "round-robin": SOFT,
    "least-loaded": "#3d6fb4",
    "power-of-two": BAD,
    "prefix-aware": GOOD,
}


class RoutingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on so many replicas.

    Attributes:
        hit_share: of the prompts' tokens, those that the replica's cache had.
        imbalance: the largest share of prefill work of a replica, over the mean.
        first_p50_s, first_p99_s: seconds to the first token.
    """

    policy: str
    replicas: int
    requests: int
    hit_share: float
    imbalance: float
    first_p50_s: float
    first_p99_s: float


class RoutingResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.routing/1"):
    """All points, simulated. `sessions_per_s`: of each replica."""

    environment: Environment
    sessions: int
    sessions_per_s: float
    seed: int
    points: list[RoutingPoint]


def make_table(result: RoutingResult) -> Table:
    """Make the table of a result: a line for each policy and number of replicas."""
    heads = ("replicas", "policy", "prompt tokens cached", "most work / mean", "first token p50 / p99, s")
    rows = [
        (
            str(point.replicas),
            point.policy,
            f"{point.hit_share:.0%}",
            f"{point.imbalance:.2f}",
            f"{point.first_p50_s:.2f} / {point.first_p99_s:.2f}",
        )
        for point in result.points
    ]
    return Table("rlrrr", heads, rows)


def render_text(result: RoutingResult) -> str:
    """Render it for a terminal."""
    return make_table(result).to_text()


def render_markdown(result: RoutingResult) -> str:
    """Render it for a page."""
    about = f"Simulated, {result.sessions} sessions for each replica, seed {result.seed}."
    return (
        f"# Routing policies\n\n{make_table(result).to_markdown()}\n\n{about} {cite_environment(result.environment)}\n"
    )


def draw(result: RoutingResult, path: Path) -> None:
    """Draw hits and the wait for a first token over the number of replicas, a line for each policy."""
    with open_figure(path, 1, 2, figsize=(10, 4.4)) as (figure, (left, right)):
        figure.subplots_adjust(left=0.07, right=0.98, top=0.82, bottom=0.2, wspace=0.22)
        style_axes(left, "Prefix hits", "prompt tokens that the replica's cache had, %")
        style_axes(right, "First token", "p99, s")
        for policy, colour in COLOURS.items():
            points = [point for point in result.points if point.policy == policy]
            counts = [point.replicas for point in points]
            left.plot(counts, [100 * p.hit_share for p in points], color=colour, marker="o", ms=4, label=policy)
            right.plot(counts, [p.first_p99_s for p in points], color=colour, marker="o", ms=4)
        for axes in (left, right):
            counts = sorted({point.replicas for point in result.points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("replicas")
            axes.set_ylim(0, None)
        left.legend(frameon=False, loc="lower left")
        where = ["simulated", f"{result.sessions} sessions a replica", result.environment.date[:10]]
        note_source(figure, 0.07, where)
