"""Statistics of a benchmark: pure functions on numbers, each of them checked against values worked out by hand.

Nothing is trimmed and no outlier is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
# Fewer units than this carry no 95% interval: a percentile bootstrap of a handful of points is far too narrow.
MIN_UNITS = 8
NO_INTERVAL = f"no interval: it needs {MIN_UNITS} of them at least"
Interval = tuple[float, float]
# Resamples drawn at once, and rows of all of them together: what bounds the memory.
BATCH, BATCH_ROWS = 500, 1 << 21


def keep_interval(interval: Interval, units: int) -> Interval | None:
    """Keep an interval that was bootstrapped over so many units; None of too few."""
    return interval if units >= MIN_UNITS else None


class RoundPair(msgspec.Struct, frozen=True, array_like=True):
    """The same prompts on both arms: output tokens and seconds of each; in JSON an array of the four."""

    baseline_tokens: int
    baseline_s: float
    candidate_tokens: int
    candidate_s: float

    @property
    def speedup(self) -> float:
        """Candidate tok/s ÷ baseline tok/s of this pair alone."""
        return (self.candidate_tokens / self.candidate_s) / (self.baseline_tokens / self.baseline_s)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean, percentiles (linear interpolation, as numpy's default), maximum and number of some values."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    n: int


def summarise(values: Sequence[float] | Floats) -> Spread | None:
    """Summarise the values' spread; None when there is no value."""
    if len(values) == 0:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return Spread(
        mean=float(array.mean()),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        max=float(array.max()),
        n=len(array),
    )


def summarise_parts(parts: Sequence[Floats]) -> Spread | None:
    """Summarise the spread of the values of all parts together, which may be millions."""
    return summarise(np.concatenate(parts)) if parts else None


def chunk_gaps_ms(chunk_ns: Sequence[int]) -> Floats:
    """Gap before each chunk after the first, in ms."""
    return np.diff(np.asarray(chunk_ns, dtype=np.int64)) / 1e6


def token_gaps_ms(chunk_ns: Sequence[int], chunk_tokens: Sequence[int]) -> Floats:
    """Inter-token latency per token in ms: a chunk of k tokens spreads the gap before it over its k tokens.

    The first chunk has no gap before it (that is the time to first token), so its tokens contribute none. The sum of
    the result is the time from the first chunk to the last.
    """
    counts = np.asarray(chunk_tokens[1:], dtype=np.int64)
    return np.repeat(chunk_gaps_ms(chunk_ns) / counts, counts)


def pool_speedup(pairs: Sequence[RoundPair]) -> float:
    """Ratio of the pooled rates: (Σ candidate tokens ÷ Σ candidate s) ÷ (Σ baseline tokens ÷ Σ baseline s)."""
    table = _as_table(pairs).sum(axis=0)
    return float((table[2] / table[3]) / (table[0] / table[1]))


def bootstrap_speedup(pairs: Sequence[RoundPair], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval of `pool_speedup`: percentile bootstrap over whole pairs, as many as there are.

    What makes one prompt slow on both arms cancels, and prompts are the population that the interval speaks about. It
    says nothing about another day, host or prompt set.
    """
    return bootstrap_table(_as_table(pairs), seed, resamples)


def bootstrap_table(table: Floats, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval of (Σ column 2 ÷ Σ column 3) ÷ (Σ column 0 ÷ Σ column 1) over the rows [N, 4]."""
    return _bootstrap(table, _pool, seed, resamples)


def bootstrap_ratio(numerator: Sequence[RoundPair], denominator: Sequence[RoundPair], seed: int) -> tuple[float, float]:
    """95% interval of `pool_speedup(numerator) / pool_speedup(denominator)`.

    Both lists are over the same rounds in the same order, and each draw takes the same rounds of both: what makes a
    prompt easy to draft for makes it so in both.
    """
    table = np.hstack([_as_table(numerator), _as_table(denominator)])
    return _bootstrap(table, lambda *sums: _pool(*sums[:4]) / _pool(*sums[4:]), seed, RESAMPLES)


def bootstrap_pooled(
    numerators: Sequence[float] | Floats, denominators: Sequence[float] | Floats, seed: int
) -> tuple[float, float]:
    """95% interval of Σ numerators ÷ Σ denominators: percentile bootstrap over the pairs that they make."""
    table = np.column_stack([numerators, denominators]).astype(np.float64)
    return _bootstrap(table, lambda above, below: above / below, seed, RESAMPLES)


def bootstrap_mean(values: Sequence[float] | Floats, seed: int) -> tuple[float, float]:
    """95% interval of a mean: percentile bootstrap over the values."""
    return bootstrap_pooled(values, np.ones(len(values)), seed)


def _bootstrap(table: Floats, ratio: Callable[..., Floats], seed: int, resamples: int) -> tuple[float, float]:
    """95% percentile interval of a ratio of column sums, rows [N, columns] drawn with replacement."""
    from scipy.stats import bootstrap  # half a second to import

    if len(table) < 2:  # one row can only be drawn as itself
        point = float(ratio(*table.sum(axis=0)))
        return point, point
    interval = bootstrap(
        tuple(table.T),
        lambda *columns, axis: ratio(*(column.sum(axis=axis) for column in columns)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, min(BATCH, BATCH_ROWS // len(table))),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = sorted((float(interval.low), float(interval.high)))  # equal but for rounding, the ends may be swapped
    return low, high


def _pool(baseline_tokens: Floats, baseline_s: Floats, candidate_tokens: Floats, candidate_s: Floats) -> Floats:
    """Speed-ups of summed tokens and seconds."""
    return (candidate_tokens / candidate_s) / (baseline_tokens / baseline_s)


def bound_mismatch_rate(mismatches: int, prompts: int, confidence: float = 0.95) -> float:
    """Exact one-sided Clopper–Pearson upper bound of the mismatch rate.

    The largest rate at which seeing `mismatches` or fewer in `prompts` still has probability 1 − confidence. With no
    mismatch it is 1 − 0.05^(1/N), which the rule of three, 3/N, approximates from above.
    """
    if mismatches >= prompts:
        return 1.0
    return float(betaincinv(mismatches + 1, prompts - mismatches, confidence))


def _as_table(pairs: Sequence[RoundPair]) -> Floats:
    return np.array(
        [(pair.baseline_tokens, pair.baseline_s, pair.candidate_tokens, pair.candidate_s) for pair in pairs],
        dtype=np.float64,
    )
