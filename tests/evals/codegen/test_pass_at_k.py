"""pass@k and intervals against values worked out by hand and by enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest

from laguna_serve.evals.codegen.pass_at_k import BOOTSTRAP, EXACT, average, average_pass_at_k, estimate_pass_at_k


@pytest.mark.parametrize(("samples", "passed", "k"), [(1, 0, 1), (5, 2, 1), (5, 2, 3), (6, 6, 2), (7, 3, 5), (4, 0, 4)])
def test_estimate_is_the_share_of_draws_with_a_pass(samples: int, passed: int, k: int) -> None:
    draws = list(combinations(range(samples), k))
    expected = sum(min(draw) < passed for draw in draws) / len(draws)
    assert estimate_pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-12)


def test_estimate_of_many_samples_does_not_overflow() -> None:
    assert estimate_pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 ≤ k ≤ n"):
        estimate_pass_at_k(samples, passed, k)


def test_single_samples_have_the_exact_interval() -> None:
    estimate = average_pass_at_k([(1, 1)] * 8 + [(1, 0)] * 2, 1)
    assert (estimate.point, estimate.method) == (0.8, EXACT)
    assert estimate.ci95 == pytest.approx((0.4439, 0.9748), abs=1e-4)  # Clopper–Pearson, 8 of 10
    assert average_pass_at_k([(1, 1)] * 20, 1).ci95 == pytest.approx((0.025 ** (1 / 20), 1.0))


def test_all_that_fail_or_pass_have_an_interval_with_width() -> None:
    none, every = average_pass_at_k([(8, 0)] * 52, 1), average_pass_at_k([(8, 8)] * 52, 4)
    assert (none.point, none.method, every.point) == (0.0, EXACT, 1.0)
    assert none.ci95 == pytest.approx((0.0, 1 - 0.025 ** (1 / 52)))
    assert every.ci95 == pytest.approx((0.025 ** (1 / 52), 1.0))


def test_several_samples_are_resampled_over_problems() -> None:
    estimate = average_pass_at_k([(2, 2), (2, 0)] * 50, 1)
    assert (estimate.point, estimate.method) == (0.5, BOOTSTRAP)
    # The standard error of 100 problems of which half pass is 0.05.
    assert estimate.ci95 == pytest.approx((0.402, 0.598), abs=0.02)
    assert average_pass_at_k([(2, 1)], 2).point == 1.0


def test_rewards_that_say_nothing_of_others_have_no_interval() -> None:
    assert average([0.25, 0.75] * 3).ci95 is None
    alike = average([0.0] * 29)
    assert (alike.point, alike.ci95, alike.method) == (0.0, None, "no interval: fewer than 30, and all alike")
    assert average([0.0] * 30).ci95 == (0.0, 0.0)
    assert average([0.25, 0.75] * 4).ci95 is not None


def test_average_is_of_problems() -> None:
    assert average([0.25, 0.75, 1.0, 0.0]).point == 0.5
