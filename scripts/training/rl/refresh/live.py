"""Does a pushed drafter do in the engine what it should? Its live acceptance against the frozen drafter's expectation.

The engine counts drafts and, by place, the accepted ones; along the same answers drafter/held_out.py says what the
first drafter, which never changed, would have had. Both give the distribution of the number n of drafts accepted in a
step, P(n ≥ k), whence its mean Σ P(n ≥ k) and its mean square Σ (2k − 1) P(n ≥ k). Welch's one-sided t-test asks
whether the live mean is below (1 − MARGIN) of the frozen one. Steps are taken as independent. Those of one answer are
not, but both sides decode the same answers, so that what makes an answer easy is no difference between them.

It is asked in every step, hence the small ALPHA. A pushed drafter that has learned nothing, or whose weights arrived
spoilt, is some ten standard errors below; one that is as good as the first is taken back once in 10,000 steps at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Share of the frozen drafter's acceptance; level of the test; drafts below which nothing is decided.
MARGIN, ALPHA, LEAST_DRAFTS = 0.05, 1e-4, 100


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps with a draft, and how many of them accepted at least 1, 2, … of it; expected ones may be fractions."""

    count: float
    accepted: Sequence[float]

    def cut(self, places: int) -> Steps:
        """Look at the first places alone."""
        return Steps(self.count, self.accepted[:places])

    @property
    def mean(self) -> float:
        """Accepted drafts per step."""
        return sum(self.accepted) / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the accepted drafts of a step."""
        if not self.count:
            return 0.0
        square = sum((2 * place + 1) * share for place, share in enumerate(self.accepted)) / self.count
        return math.sqrt(max(0.0, square - self.mean**2))


def find_p_below(live: Steps, frozen: Steps) -> float | None:
    """Test whether live acceptance is below the frozen drafter's, less the margin; None: too few drafts to say."""
    if min(live.count, frozen.count) < LEAST_DRAFTS:
        return None
    from scipy.stats import ttest_ind_from_stats  # half a second to import

    keep = 1 - MARGIN
    wanted = (keep * frozen.mean, keep * frozen.deviation, frozen.count)
    if live.deviation == wanted[1] == 0:
        return 0.0 if live.mean < wanted[0] else 1.0
    test = ttest_ind_from_stats(live.mean, live.deviation, live.count, *wanted, equal_var=False, alternative="less")
    return float(test.pvalue)


def falls_short(p_below: float | None) -> bool:
    """Say whether a drafter with this p is to be taken back."""
    return p_below is not None and p_below < ALPHA
