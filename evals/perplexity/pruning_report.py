"""The result of a pruning curve: pruning_loss.json; in columns for a terminal; and as a page."""

from __future__ import annotations

import statistics

import msgspec

from laguna_serve.evals.perplexity.mean import Mean
from laguna_serve.serving.kit.environment import Environment, cite_environment
from laguna_serve.serving.kit.tables import Table


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """The text that every model was asked."""

    source: str
    documents: int
    rows: int
    length: int
    scored_tokens: int


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One share: the ranked mask's loss (nats per token), those of the random ones, and what each adds."""

    share: float
    ranked: float
    ranked_delta: Mean
    random: list[float]
    random_delta: float
    ranked_is_better: bool


class PruningResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_loss_endpoint/1"
):
    """What evals/pruning_loss.py writes to pruning_loss.json."""

    environment: Environment
    model: str
    dtype: str
    seeds: int
    data: Data
    unpruned: Mean
    points: list[Point]


def render_text(result: PruningResult) -> str:
    """Render the points in columns, and the data below."""
    return f"{_tabulate(result).to_text()}\n\n{_describe_data(result)}"


def render_markdown(result: PruningResult) -> str:
    """Render the same as a page."""
    lines = ["# What pruning adds to the loss, through vLLM", "", f"{result.model}, nats per token.", ""]
    lines += [_tabulate(result).to_markdown(), "", "![curve](pruning_loss.png)", "", _describe_data(result), ""]
    return "\n".join([*lines, cite_environment(result.environment)]) + "\n"


def _tabulate(result: PruningResult) -> Table:
    heads = ("groups pruned", "ranked", "Δ", "95% interval of Δ", "random, mean", "Δ", "random, least to most")
    base = f"{result.unpruned.nats_per_token:.4f}"
    cells: list[tuple[str, ...]] = [("0%", base, "", "", base, "", "")]
    for point in result.points:
        delta, random = point.ranked_delta, point.random
        interval = "–" if delta.ci95 is None else f"{delta.ci95[0]:+.4f} to {delta.ci95[1]:+.4f}"
        ranked = (f"{point.ranked:.4f}", f"{delta.nats_per_token:+.4f}", interval)
        drawn = (f"{statistics.mean(random):.4f}", f"{point.random_delta:+.4f}")
        cells.append((f"{point.share:.0%}", *ranked, *drawn, f"{min(random):.4f} to {max(random):.4f}"))
    return Table("r" * len(heads), heads, cells)


def _describe_data(result: PruningResult) -> str:
    data, base = result.data, result.unpruned
    rows = f"{data.rows} evenly spaced rows of at most {data.length}"
    return (
        f"Over {data.scored_tokens:,} tokens of {data.source} ({data.documents} documents, {rows}),"
        f" {result.dtype}. Random masks per share: {result.seeds}. The intervals draw {base.units} {base.drawn}."
    )
