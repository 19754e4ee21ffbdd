"""How much the machine changed while one engine after another was measured, and what that may have done to a ratio.

Measured in the order A, B, A, the baseline stands on both sides of the candidate. Its rate is that of both passes
together, from which a steady drift cancels. A step may lie anywhere between the passes: while the candidate ran, the
baseline would have been as fast as in one of them, so that an interval is widened to both. What comes and goes during
the candidate's pass alone is not seen; the share of processor time that others took tells of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup

# Of a drift beyond this a report warns: intervals allow for it, and another run would have narrower ones.
WARNED = 0.05

Interval = tuple[float, float]


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """The baseline's tok/s in its last pass ÷ that in its first, over the same rounds, and its 95% interval."""

    ratio: float
    ci95: Interval

    @property
    def is_large(self) -> bool:
        """Large enough for a warning."""
        return abs(self.ratio - 1) > WARNED

    @property
    def reach(self) -> Interval:
        """By what a ratio to both passes together may be wrong: its factors to the faster and to the slower pass."""
        factors = 2 * self.ratio / (1 + self.ratio), 2 / (1 + self.ratio)
        return min(factors), max(factors)

    def widen(self, interval: Interval) -> Interval:
        """Widen an interval of a ratio to both passes, so that it holds against either."""
        least, most = self.reach
        return interval[0] * least, interval[1] * most

    def describe(self) -> str:
        """One sentence for people."""
        low, high = self.ci95
        said = f"the baseline's last pass is {self.ratio:.3f} times as fast as its first ({low:.3f}–{high:.3f})"
        if self.is_large:
            return f"{said}: more than {WARNED:.0%} apart; intervals allow for it, measure again with nothing beside it"
        return f"{said}; intervals allow for it"


def find_drift(passes: Sequence[RoundPair], seed: int) -> Drift:
    """From the rounds of the first pass (as baseline) and of the last (as candidate)."""
    return Drift(ratio=pool_speedup(passes), ci95=bootstrap_speedup(passes, seed))


def widen(interval: Interval, drift: Drift | msgspec.UnsetType | None) -> Interval:
    """Widen the interval, allowing for a drift where there was one to see."""
    return drift.widen(interval) if isinstance(drift, Drift) else interval


def widen_quotient(
    interval: Interval, over: Drift | msgspec.UnsetType | None, under: Drift | msgspec.UnsetType | None
) -> Interval:
    """Widen the interval of one such ratio ÷ another one: either may be wrong by its own drift."""
    low, high = widen(interval, over)
    least, most = under.reach if isinstance(under, Drift) else (1.0, 1.0)
    return low / most, high / least
