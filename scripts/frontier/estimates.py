"""What can be said of losses that were measured on the same rows of text, with masks of several calibration draws.

Rows and draws are two samples that are crossed: a mask of every draw is measured on every row. The variance of a mean
is that of the rows plus that of the draws, the rows' by the ratio of sums (rows differ in length), and its interval is
Student's t with Satterthwaite's degrees of freedom. What rows and draws share is counted in both, so that intervals
are a little wide. One draw alone says nothing of draws: the interval then is that of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEVEL = 0.95


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A mean difference in nats per token, and its interval."""

    delta: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Zero is not in it."""
        return self.low > 0 or self.high < 0


class Rival(Interval, frozen=True, kw_only=True):
    """How much more another mask costs than the best one, of the same draw and rows."""

    mask: str


class Contest(msgspec.Struct, frozen=True, kw_only=True):
    """Which mask costs least at one share in one format; each rival's interval is wide enough for all of them.

    Attributes:
        rivals: the others, from the least to the most costly.
    """

    format: str
    ratio: float
    best: str
    rivals: tuple[Rival, ...]

    @property
    def equals(self) -> tuple[str, ...]:
        """Rivals that cannot be distinguished from the best."""
        return tuple(rival.mask for rival in self.rivals if not rival.is_clear)


def estimate(added: Floats, targets: npt.NDArray[np.int64], level: float = LEVEL) -> Interval:
    """Estimate the mean of differences.

    added [S, R]: summed nats of S draws on R rows; targets [R]: tokens predicted in each row.
    """
    from scipy.special import stdtrit  # a tenth of a second to import

    draws, rows = added.shape
    total = targets.sum()
    delta = float(added.mean(0).sum() / total)
    by_draw = float((added.sum(1) / total).var(ddof=1) / draws) if draws > 1 else 0.0
    residuals = added.mean(0) - delta * targets
    by_row = float(rows / (rows - 1) * np.square(residuals).sum() / total**2) if rows > 1 else 0.0
    variance = by_draw + by_row
    if not variance:
        return Interval(delta=delta, low=delta, high=delta)
    freedom = variance**2 / (by_draw**2 / max(1, draws - 1) + by_row**2 / max(1, rows - 1))
    half = float(stdtrit(freedom, (1 + level) / 2)) * variance**0.5
    return Interval(delta=delta, low=delta - half, high=delta + half)


def compare(stored: str, ratio: float, nats: Mapping[str, Floats], targets: npt.NDArray[np.int64]) -> Contest:
    """Compare masks with the best of them. nats: mask → [S, R]. Bonferroni's level for as many rivals as there are."""
    best = min(nats, key=lambda name: nats[name].sum())
    level = 1 - (1 - LEVEL) / max(1, len(nats) - 1)
    gaps = {name: estimate(one - nats[best], targets, level) for name, one in nats.items() if name != best}
    rivals = [Rival(mask=name, delta=gap.delta, low=gap.low, high=gap.high) for name, gap in gaps.items()]
    return Contest(format=stored, ratio=ratio, best=best, rivals=tuple(sorted(rivals, key=lambda rival: rival.delta)))


def rank(values: npt.NDArray[np.float32]) -> Floats:
    """Ranks of values, equal ones sharing the mean of theirs."""
    from scipy.stats import rankdata  # a tenth of a second to import, or more

    return np.asarray(rankdata(values.ravel()), dtype=np.float64)


Draw = Mapping[str, npt.NDArray[np.float32]]


def correlate(draws: Sequence[Draw]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of every two scores: the mean over the draws of the calibration text."""
    ranks = [{name: rank(values) for name, values in scores.items()} for scores in draws]
    return {one: {other: _mean([(draw[one], draw[other]) for draw in ranks]) for other in ranks[0]} for one in ranks[0]}


def correlate_draws(draws: Sequence[Draw]) -> dict[str, float]:
    """Spearman's rank correlation of each score with itself on another draw: the mean over pairs; 1 of one draw."""
    ranks = [{name: rank(values) for name, values in scores.items()} for scores in draws]
    return {name: _mean([(a[name], b[name]) for a, b in combinations(ranks, 2)]) for name in ranks[0]}


def _mean(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    return round(float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs])), 4) if pairs else 1.0
