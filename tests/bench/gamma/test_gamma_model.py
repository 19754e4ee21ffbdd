"""Choosing γ, the schedule and the predictions, on points worked out by hand."""

from __future__ import annotations

import random

import pytest

from laguna_serve.bench.gamma.cost_model import CostModel, Point, choose_gamma, fit_costs, make_schedule
from laguna_serve.bench.gamma.result import Choice
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_ratio, bootstrap_speedup, pool_speedup


def point(gamma: int, speedup: float, spread: float = 0.02, *, cost: float = 1.5, seed: int = 0) -> Point:
    """Thirty rounds around a speed-up; the same seed makes rounds that are easy or hard together."""
    rng = random.Random(seed)
    pairs = tuple(RoundPair(100, 1.0, 100, 1 / (speedup * (1 + rng.uniform(-spread, spread)))) for _ in range(30))
    profile = tuple(0.7**i for i in range(1, gamma + 1))
    return Point(gamma, 1, pool_speedup(pairs), bootstrap_speedup(pairs, 0), 1 + sum(profile), profile, cost, pairs)


@pytest.mark.slow
def test_fastest_is_chosen() -> None:
    choice = choose_gamma([point(1, 1.1), point(3, 1.6), point(7, 1.3)], seed=0)
    assert choice.gamma == 3
    assert choice.reason.startswith("1.6")


def test_smaller_of_two_that_do_not_differ_is_preferred() -> None:
    """Rounds of their own: 7 looks better by a hair, and may not be."""
    points = [point(1, 1.1), point(3, 1.50, 0.3, seed=1), point(7, 1.53, 0.3, seed=2)]
    choice = choose_gamma(points, seed=0)
    assert choice.gamma == 3
    assert "7 is no different" in choice.reason


def test_small_difference_that_every_round_shows_counts() -> None:
    assert choose_gamma([point(3, 1.50, 0.3), point(7, 1.53, 0.3)], seed=0).gamma == 7


def test_nothing_is_chosen_where_nothing_pays_for_certain() -> None:
    choice = choose_gamma([point(1, 1.01, 0.5), point(7, 0.8)], seed=0)
    assert choice.gamma == 0
    assert "no γ is faster for certain: the best is 1" in choice.reason


def test_schedule_covers_every_batch_size_from_one() -> None:
    choices = [Choice(16, 0, ""), Choice(1, 7, ""), Choice(4, 3, "")]
    assert make_schedule(choices) == [(1, 1, 7), (2, 4, 3), (5, 16, 0)]
    assert make_schedule([Choice(1, 7, ""), Choice(4, 7, ""), Choice(8, 1, "")]) == [(1, 4, 7), (5, 8, 1)]
    assert make_schedule([Choice(8, 2, "")]) == [(1, 8, 2)]


@pytest.mark.vllm
def test_schedule_is_one_that_vllm_takes() -> None:
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    schedule = make_schedule([Choice(1, 7, ""), Choice(4, 3, ""), Choice(16, 0, "")])
    assert build_dynamic_sd_schedule_lookup(schedule, 20, 7) == [0, 7, *[3] * 3, *[0] * 16]


def test_costs_on_a_line_are_found() -> None:
    model = fit_costs([point(gamma, 1.5, cost=1.4 + 0.1 * gamma) for gamma in (1, 3, 7)])
    assert (model.fixed, model.per_token) == (pytest.approx(0.4), pytest.approx(0.1))
    assert model.tau(7) == pytest.approx(1 + sum(0.7**i for i in range(1, 8)))
    assert model.speedup(3) == pytest.approx((1 + 0.7 + 0.49 + 0.343) / 1.7)


def test_single_point_gives_a_constant_cost() -> None:
    model = fit_costs([point(3, 1.5, cost=1.8)])
    assert (model.cost(1), model.cost(3)) == (pytest.approx(1.8), pytest.approx(1.8))


def test_useless_drafter_never_pays() -> None:
    model = CostModel(0.3, 0.05, (0.0,) * 7)
    assert all(model.speedup(gamma) < 1 for gamma in range(1, 8))


def test_ratio_of_the_same_rounds_is_exact() -> None:
    easy = point(3, 1.5, 0.4).pairs
    faster = tuple(RoundPair(p.baseline_tokens, p.baseline_s, p.candidate_tokens, p.candidate_s / 1.1) for p in easy)
    low, high = bootstrap_ratio(faster, easy, seed=0)
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.1)
    low, high = bootstrap_ratio(point(3, 1.5, 0.4, seed=5).pairs, easy, seed=0)
    assert low < 1 < high
