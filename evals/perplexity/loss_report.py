"""The result of a loss: loss.json, schema laguna_serve.loss/1; in columns for a terminal; and as a page."""

from __future__ import annotations

import msgspec

from laguna_serve.bench.stats.intervals import NO_INTERVAL
from laguna_serve.evals.perplexity.mean import Mean
from laguna_serve.serving.kit.environment import Environment, cite_environment
from laguna_serve.serving.kit.tables import Table


class Bounded(msgspec.Struct, frozen=True):
    """A figure that follows from the loss, with its 95% interval."""

    value: float
    ci95: list[float] | None


class AskedEndpoint(msgspec.Struct, frozen=True):
    """Who answered. `root`: where the endpoint says that the model was loaded from."""

    model: str
    root: str | None
    max_model_len: int


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """What was scored. `documents`, `length`, `stride` and the last two are of text alone."""

    source: str
    documents: int | None
    rows: int
    scored_tokens: int
    length: int | None
    stride: int | None
    sha256: str
    text_tokens: int | msgspec.UnsetType = msgspec.UNSET
    text_bytes: int | msgspec.UnsetType = msgspec.UNSET


class LossResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.loss/1"):
    """What evals/loss.py writes to loss.json."""

    environment: Environment
    endpoint: AskedEndpoint
    data: Data
    loss: Mean
    perplexity: Bounded
    bits_per_byte: Bounded | None


def render_text(result: LossResult) -> str:
    """Render the figures in columns, and the data below."""
    return f"{_tabulate(result).to_text()}\n\n{_describe_data(result)}"


def render_markdown(result: LossResult) -> str:
    """Render the same as a page."""
    lines = [f"# Loss of {result.endpoint.model} on {result.data.source}", "", _tabulate(result).to_markdown()]
    return "\n".join([*lines, "", _describe_data(result), "", cite_environment(result.environment)]) + "\n"


def _tabulate(result: LossResult) -> Table:
    bits = result.bits_per_byte
    figures = [
        ("loss, nats/token", result.loss.nats_per_token, result.loss.ci95),
        ("perplexity", result.perplexity.value, result.perplexity.ci95),
        *([] if bits is None else [("bits per byte", bits.value, bits.ci95)]),
    ]
    rows = [
        (name, f"{value:.4f}", "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}")
        for name, value, interval in figures
    ]
    return Table("lrr", ("", "", "95% interval"), rows)


def _describe_data(result: LossResult) -> str:
    data, loss = result.data, result.loss
    cut = "" if data.length is None else f" of at most {data.length} tokens, stride {data.stride}"
    drawn = f"the interval draws {loss.units} {loss.drawn}"
    if loss.ci95 is None:
        drawn = f"{loss.units} {loss.drawn}, so {NO_INTERVAL}"
    return f"{data.scored_tokens:,} tokens scored in {data.rows} rows{cut}; {drawn}."
