"""Could the labels "baseline" and "candidate" be exchanged? Exact tests for a few repeats of two arms per problem.

Under the hypothesis that nothing but the engine's own noise makes answers differ, the 2k answers to a problem are
exchangeable: every way of calling k of them the baseline's was equally likely. Both tests condition on what was
answered and count labellings, so they are exact at any k, need no model of the noise (a problem that hangs on a near
tie may be far noisier than the others) and take problems as independent, not as alike. The price of few repeats is
power: one problem on which the arms are cleanly apart has p = 1/3 at k = 2 and 1/462 at k = 6; n such problems at
k = 2 have 3⁻ⁿ. Pure.

A problem is given as a matrix [2k, 2k] of booleans, symmetric: do answers i and j differ? The first k are the
baseline's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def find_apart_p(problems: Sequence[Bools]) -> float:
    """One-sided p-value: pairs of one answer of each arm differ more often than relabelled answers would.

    The statistic is the number of such pairs over all problems; its null distribution is the convolution of the
    problems' own, each over all C(2k, k) labellings. It sees arms that prefer different answers, and is nearly blind to
    an arm that only scatters more: `find_scatter_p` is for that.
    """
    observed = 0
    chances: npt.NDArray[np.float64] = np.ones(1)
    for differ in problems:
        if differ.any():
            counts = _count_across(differ)
            observed += int(counts[0])
            chances = np.convolve(chances, np.bincount(counts) / len(counts)).astype(np.float64)
    return float(min(1.0, chances[observed:].sum()))


def find_scatter_p(problems: Sequence[Bools]) -> float:
    """One-sided p-value: the candidate parts from itself on more problems than the baseline does from itself.

    McNemar's test, exact: a problem on which one arm alone is unsteady is as likely to be either's.
    """
    unsteady = [(is_unsteady(differ, 0), is_unsteady(differ, 1)) for differ in problems]
    lone = [candidate for baseline, candidate in unsteady if baseline != candidate]
    ways = sum(math.comb(len(lone), count) for count in range(sum(lone), len(lone) + 1))
    return float(ways / 2 ** len(lone))


def is_unsteady(differ: Bools, arm: int) -> bool:
    """Whether an arm (0: the baseline, 1: the candidate) parts from itself."""
    repeats = len(differ) // 2
    own = slice(arm * repeats, (arm + 1) * repeats)
    return bool(differ[own, own].any())


def is_apart(differ: Bools) -> bool:
    """Whether some answer of the one arm differs from some answer of the other."""
    repeats = len(differ) // 2
    return bool(differ[:repeats, repeats:].any())


def _count_across(differ: Bools) -> Counts:
    """Differing pairs across the arms under every labelling [C(2k, k)], the actual one first."""
    halves = _list_labellings(len(differ))
    across: Counts = ((halves @ differ.astype(np.int64)) * (1 - halves)).sum(axis=1)
    return across


@cache
def _list_labellings(size: int) -> Counts:
    """Every choice of half of the answers [C(size, size ÷ 2), size], 1 where chosen; the first half first."""
    halves = np.zeros((math.comb(size, size // 2), size), dtype=np.int64)
    for row, chosen in enumerate(combinations(range(size), size // 2)):
        halves[row, list(chosen)] = 1
    return halves
