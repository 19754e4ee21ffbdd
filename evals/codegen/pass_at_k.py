"""pass@k and the dense reward over problems, with 95% intervals. Pure.

Problems are what the intervals speak about: another set of problems like these. They say nothing about another prompt
format, or about another machine's numerics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laguna_serve.bench.stats.intervals import MIN_UNITS, NO_INTERVAL, bootstrap_mean, bound_mismatch_rate

# So many problems of one value say that others would have it, too; an interval of fewer would have no width.
MIN_ALIKE = 30
EXACT, BOOTSTRAP = "Clopper–Pearson", "bootstrap over problems"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems, its two-sided 95% interval, and how that was found, or why there is none."""

    point: float
    ci95: tuple[float, float] | None
    method: str


def estimate_pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, unbiased, from `passed` of `samples`: 1 − C(n−c, k) ÷ C(n, k).

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374, §2.1.

    Raises:
        ValueError: not 1 ≤ k ≤ samples, or not 0 ≤ passed ≤ samples.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@k: expected 1 ≤ k ≤ n and 0 ≤ c ≤ n, got k={k}, n={samples}, c={passed}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def average_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Estimate:
    """Mean pass@k over problems; `counts`: (samples, passed) of each.

    The interval is exact (Clopper–Pearson) where problems simply pass or fail: with one sample each, and where all
    are certain to fail or all to pass, of which resampling would make an interval without width. Else it is a
    percentile bootstrap over problems.
    """
    values = [estimate_pass_at_k(samples, passed, k) for samples, passed in counts]
    if all(samples == 1 for samples, _ in counts) or set(values) in ({0.0}, {1.0}):
        total, passed = len(values), round(sum(values))
        # Each side at 97.5%; the bound from below is the bound from above of the failures.
        low = 1.0 - bound_mismatch_rate(total - passed, total, 0.975)
        return Estimate(passed / total, (low, bound_mismatch_rate(passed, total, 0.975)), EXACT)
    return average(values)


def average(values: Sequence[float]) -> Estimate:
    """Mean of one value per problem, with a percentile bootstrap interval over problems.

    There is none of a handful, nor where less than MIN_ALIKE are all the same: resampling cannot know what it has not
    seen.
    """
    if len(values) < MIN_UNITS:
        return Estimate(float(np.mean(values)), None, NO_INTERVAL)
    if len(values) < MIN_ALIKE and len(set(values)) == 1:
        return Estimate(float(np.mean(values)), None, f"no interval: fewer than {MIN_ALIKE}, and all alike")
    return Estimate(float(np.mean(values)), bootstrap_mean(values, seed=0), BOOTSTRAP)
