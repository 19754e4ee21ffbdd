"""What bench/swap measured, for people: as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET

from laguna_serve.bench.stats.quartiles import Quartiles
from laguna_serve.bench.swap.result import SituationName, SwapResult
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

WHAT: Mapping[SituationName, str] = {
    "warm": "both models in memory, asked in turn",
    "cold": "no engine runs",
    "swap": "the other model's engine is ended first, as soon as it has answered",
    "rested": "the same, after it has been there for a while",
    "woken": "the other model's engine is put to sleep first",
    "restart": "by hand: one engine is ended, the other started, and asked when it is healthy",
}


def render_text(result: SwapResult) -> str:
    """Render a row per situation and model, and what a swap takes of a restart."""
    return "\n".join([_summarise(result), "", _tabulate(result).to_text()])


def render_markdown(result: SwapResult) -> str:
    """Render the same as a page."""
    lines = [
        "# What changing models costs",
        "",
        _summarise(result),
        "",
        _tabulate(result).to_markdown(),
        "",
        cite_environment(result.environment),
    ]
    return "\n".join(lines) + "\n"


def _summarise(result: SwapResult) -> str:
    shares = [f"A swap takes {_show(result.swap_to_restart)} of a restart"]
    if result.rest_s is not UNSET and result.rested_to_restart is not UNSET:
        shares.append(f"{_show(result.rested_to_restart)} when the other engine has been there for {result.rest_s:g} s")
    compiled = "not compiled" if result.eager else "compiled"
    return (
        f"{result.models[0]} and {result.models[1]}, {compiled}, {result.rounds} rounds; room for one:"
        f" {result.memory_gib:.2f} GiB. {', '.join(shares)}."
    )


def _show(ratio: Quartiles) -> str:
    return f"{ratio.median:.2f} ({ratio.q25:.2f}–{ratio.q75:.2f})"


def _tabulate(result: SwapResult) -> Table:
    heads = ("situation", "", "model", "requests", "to the first token, s", "quartiles")
    rows = []
    for one in result.situations:
        spread, digits = one.spread, 3 if one.name == "warm" else 1
        quartiles = f"{spread.q25:.{digits}f}–{spread.q75:.{digits}f}"
        median = f"{spread.median:.{digits}f}"
        rows.append([one.name, WHAT[one.name], one.model, str(len(one.ttft_s)), median, quartiles])
    return Table("lllrrr", heads, rows)
