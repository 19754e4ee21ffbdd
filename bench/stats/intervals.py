"""Statistics of a benchmark: pure functions on numbers, each of them checked against values worked out by hand.

Nothing is trimmed and no outlier is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
BLOCK = 500  # resamples drawn at once: bounds memory to BLOCK × pairs indices


@dataclass(frozen=True, slots=True)
class RoundPair:
    """The same prompts on both arms: output tokens and seconds of each."""

    baseline_tokens: int
    baseline_s: float
    candidate_tokens: int
    candidate_s: float

    @property
    def speedup(self) -> float:
        """Candidate tok/s ÷ baseline tok/s of this pair alone."""
        return (self.candidate_tokens / self.candidate_s) / (self.baseline_tokens / self.baseline_s)


def summarise(values: Sequence[float] | Floats) -> dict[str, float] | None:
    """Mean and percentiles (linear interpolation, as numpy's default); None when there is no value."""
    if len(values) == 0:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return {
        "mean": float(array.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(array.max()),
        "n": len(array),
    }


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


def bootstrap_speedup(
    pairs: Sequence[RoundPair], seed: int, resamples: int = RESAMPLES, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of `pool_speedup`.

    Whole pairs are drawn with replacement, as many as there are, and the pooled ratio is computed of each draw: what
    makes one prompt slow on both arms cancels, and prompts are the population that the interval speaks about. It says
    nothing about another day, host or prompt set.
    """
    return bootstrap_table(_as_table(pairs), seed, resamples, confidence)


def bootstrap_table(
    table: Floats, seed: int, resamples: int = RESAMPLES, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of (Σ column 2 ÷ Σ column 3) ÷ (Σ column 0 ÷ Σ column 1) over the rows [N, 4]."""
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for start in range(0, resamples, BLOCK):
        rows = min(BLOCK, resamples - start)
        sums = table[rng.integers(0, len(table), size=(rows, len(table)))].sum(axis=1)
        ratios[start : start + rows] = _pool(sums)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_ratio(
    numerator: Sequence[RoundPair], denominator: Sequence[RoundPair], seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of `pool_speedup(numerator) / pool_speedup(denominator)`.

    Both lists are over the same rounds in the same order, and each draw takes the same rounds of both: what makes a
    prompt easy to draft for makes it so in both.
    """
    tables = _as_table(numerator), _as_table(denominator)
    rng = np.random.default_rng(seed)
    count = len(tables[0])
    ratios = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, BLOCK):
        rows = min(BLOCK, RESAMPLES - start)
        drawn = rng.integers(0, count, size=(rows, count))
        speedups = [_pool(table[drawn].sum(axis=1)) for table in tables]
        ratios[start : start + rows] = speedups[0] / speedups[1]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def _pool(sums: Floats) -> Floats:
    """Speed-ups of rows of summed (baseline tokens, baseline s, candidate tokens, candidate s)."""
    return (sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1])


def bound_mismatch_rate(mismatches: int, prompts: int, confidence: float = 0.95) -> float:
    """Exact one-sided Clopper–Pearson upper bound of the mismatch rate.

    The largest rate at which seeing `mismatches` or fewer in `prompts` still has probability 1 − confidence. With no
    mismatch it is 1 − 0.05^(1/N), which the rule of three, 3/N, approximates from above.
    """
    if mismatches >= prompts:
        return 1.0
    low, high = mismatches / prompts, 1.0
    for _ in range(100):  # bisection: the cumulative probability falls as the rate grows
        middle = (low + high) / 2
        if _binomial_cdf(mismatches, prompts, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _as_table(pairs: Sequence[RoundPair]) -> Floats:
    return np.array(
        [(pair.baseline_tokens, pair.baseline_s, pair.candidate_tokens, pair.candidate_s) for pair in pairs],
        dtype=np.float64,
    )


def _binomial_cdf(k: int, n: int, rate: float) -> float:
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return math.fsum(
        math.exp(choose + i * math.log(rate) + (n - i) * math.log1p(-rate)) for i, choose in enumerate(log_choose)
    )
