"""What a drift between the baseline's passes is, and what it does to an interval; by hand."""

from __future__ import annotations

import pytest
from msgspec import UNSET

from laguna_serve.bench.stats.drift import Drift, find_drift, widen, widen_quotient
from laguna_serve.bench.stats.intervals import RoundPair, pool_speedup


def test_drift_is_the_ratio_of_the_passes_rates() -> None:
    drift = find_drift([RoundPair(100, 1.0, 100, 1.25)] * 8, seed=0)
    assert drift.ratio == pytest.approx(0.8)
    assert drift.ci95 == pytest.approx((0.8, 0.8))
    assert drift.is_large
    assert "0.800 times as fast as its first (0.800–0.800): more than 5% apart" in drift.describe()


def test_interval_reaches_to_the_ratio_against_either_pass() -> None:
    # The baseline took 1 s and 1.5 s, the candidate 0.5 s: 2.5 of both together, 2 of the first, 3 of the last.
    drift = find_drift([RoundPair(100, 1.0, 100, 1.5)], seed=0)
    point = pool_speedup([RoundPair(200, 2.5, 100, 0.5)])
    assert point == pytest.approx(2.5)
    assert drift.widen((point, point)) == pytest.approx((2, 3))
    faster = find_drift([RoundPair(100, 1.5, 100, 1.0)], seed=0)
    assert faster.widen((point, point)) == pytest.approx((2, 3))


def test_steady_baseline_leaves_the_interval() -> None:
    steady = Drift(ratio=1.0, ci95=(0.99, 1.01))
    assert steady.widen((1.4, 1.6)) == (1.4, 1.6)
    assert not steady.is_large
    assert steady.describe().endswith("intervals allow for it")


def test_without_a_drift_nothing_is_widened() -> None:
    assert widen((1.4, 1.6), None) == widen((1.4, 1.6), UNSET) == (1.4, 1.6)


def test_quotient_of_two_ratios_reaches_as_far_as_both_drifts_allow() -> None:
    # 2.5 of both passes is 2 to 3 of either, and so is the other one: their quotient is 2/3 to 3/2.
    drift = find_drift([RoundPair(100, 1.0, 100, 1.5)], seed=0)
    assert widen_quotient((1.0, 1.0), drift, drift) == pytest.approx((2 / 3, 3 / 2))
    assert widen_quotient((1.0, 1.0), drift, None) == pytest.approx((0.8, 1.2))
    assert widen_quotient((1.0, 1.0), UNSET, drift) == pytest.approx((1 / 1.2, 1 / 0.8))
    assert widen_quotient((0.9, 1.1), UNSET, None) == (0.9, 1.1)
