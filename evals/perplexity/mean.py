"""Mean loss per token with its interval, from the summed losses of rows. Pure functions.

Every scored token counts the same, whatever row it stands in. Rows of one document are alike, so whole documents are
drawn for the interval; with fewer than MIN_DOCUMENTS of them there is nothing to draw from, and rows are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from laguna_serve.bench.stats.intervals import bootstrap_pooled, keep_interval
from laguna_serve.evals.perplexity.rows import Row

MIN_DOCUMENTS = 10


class Mean(msgspec.Struct, frozen=True):
    """A loss or a difference of two, with its 95% interval (None with fewer than MIN_UNITS units).

    What was drawn for the interval: `units` documents or rows.
    """

    nats_per_token: float
    ci95: tuple[float, float] | None
    drawn: str
    units: int


def average(rows: Sequence[Row], nats: Mapping[int, float], seed: int = 0) -> Mean:
    """Σ nats ÷ Σ scored tokens, `nats` by the row's number in `rows`, and a percentile bootstrap of it."""
    unit = choose_unit(rows)
    by_unit: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_unit.setdefault(row.document if unit == "documents" else number, []).append(number)
    sums = [math.fsum(nats[number] for number in numbers) for numbers in by_unit.values()]
    scored = [sum(rows[number].scored for number in numbers) for numbers in by_unit.values()]
    mean = math.fsum(nats[number] for number in range(len(rows))) / sum(row.scored for row in rows)
    return Mean(mean, keep_interval(bootstrap_pooled(sums, scored, seed), len(sums)), unit, len(sums))


def choose_unit(rows: Sequence[Row]) -> str:
    """Choose what is drawn for the interval."""
    return "documents" if len({row.document for row in rows}) >= MIN_DOCUMENTS else "rows"


def subtract(rows: Sequence[Row], nats: Mapping[int, float], base: Mapping[int, float]) -> Mean:
    """How much higher the loss is than that of another model on the same rows.

    It is paired, so what makes a row hard for both cancels in the interval.
    """
    return average(rows, {number: nats[number] - base[number] for number in range(len(rows))})


def to_bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Tokens per byte × bits per token: independent of the tokenizer, unlike the loss of a token.

    Source: Gao et al., The Pile (2020), section 3.1.
    """
    return tokens / text_bytes * nats_per_token / math.log(2)
