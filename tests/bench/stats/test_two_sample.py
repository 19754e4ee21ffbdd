"""The two-sample test: by hand, under the null, and on what it must find."""

from __future__ import annotations

import numpy as np
import pytest

from laguna_serve.bench.stats.two_sample import Completion, _score, adjust, compare, find_power, sharpen

ONE: list[list[Completion]] = [[(1, 1)] * 30]
OTHER: list[list[Completion]] = [[(2, 2)] * 30]


def draw(rng: np.random.Generator, prompts: int, count: int) -> list[list[Completion]]:
    return [[tuple(rng.choice(3, size=4, p=(0.6, 0.3, 0.1)).tolist()) for _ in range(count)] for _ in range(prompts)]


def test_disjoint_sets_have_the_least_p_value() -> None:
    found = compare(ONE, OTHER, np.random.default_rng(0), 999)
    assert found.pooled_p == found.p_values[0] == 1 / 1000
    assert found.least == 2 / 1000


def test_equal_sets_never_differ() -> None:
    assert compare(ONE, ONE, np.random.default_rng(0), 999).least == 1.0


@pytest.mark.slow
def test_exact_p_value_of_a_small_deal() -> None:
    """Ten of each token, all on their own side: 2 of the C(20, 10) deals are as extreme; so are 2 / 184756 of ours."""
    left, right = [[(1,)] * 10], [[(2,)] * 10]
    assert compare(left, right, np.random.default_rng(0), 9999).pooled_p == pytest.approx(1 / 10000, abs=2e-4)
    # Nine against one: deals with at least 9 of a token on one side: 2 · (1 + 100) of 184756.
    left, right = [[*[(1,)] * 9, (2,)]], [[*[(2,)] * 9, (1,)]]
    found = compare(left, right, np.random.default_rng(0), 50_000).pooled_p
    assert found == pytest.approx(202 / 184756, abs=5e-4)


@pytest.mark.slow
def test_null_p_values_are_uniform_enough() -> None:
    rng = np.random.default_rng(1)
    found = [compare(draw(rng, 4, 60), draw(rng, 4, 60), rng, 199).pooled_p for _ in range(60)]
    assert 0.35 < float(np.mean(found)) < 0.65
    assert sum(p <= 0.1 for p in found) <= 14  # 6 expected; more than 14 has a chance of 1 in 1000


def test_later_tokens_given_the_earlier_ones_are_tested() -> None:
    """Every position has the same marginal distribution on both sides; only what follows what differs."""
    together: list[list[Completion]] = [[(0, 0)] * 50 + [(1, 1)] * 50]
    crossed: list[list[Completion]] = [[(0, 1)] * 50 + [(1, 0)] * 50]
    assert compare(together, crossed, np.random.default_rng(0), 999).pooled_p == 1 / 1000


def test_holm_by_hand() -> None:
    assert adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust([0.5, 0.9]) == [1.0, 1.0]


def test_sharpening_moves_towards_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    (completions,) = draw(rng, 1, 2000)
    sharp = sharpen(completions, 0.5, rng)
    assert sharp.count((0, 0, 0, 0)) > completions.count((0, 0, 0, 0)) + 800
    assert sharpen(completions, 0.0, rng) == completions


@pytest.mark.slow
def test_power_grows_with_the_share_and_is_the_level_without_one() -> None:
    rng = np.random.default_rng(0)
    pool = draw(rng, 4, 300)
    power = [find_power(pool, share, 0.05, rng, trials=30, permutations=199) for share in (0.0, 0.1, 0.4)]
    assert power[0] <= 0.2
    assert power[0] <= power[1] <= power[2]
    assert power[2] == 1.0


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected equally many of every prompt on both arms, got \\[29, 30\\]"):
        compare(ONE, [OTHER[0][:29]], np.random.default_rng(0), 9)


def test_prefixes_that_are_rare_are_left_out() -> None:
    """Nine of a token that the other side never has, of at least ten that count."""
    baseline: list[list[Completion]] = [[(0,)] * 21 + [(1,)] * 9]
    candidate: list[list[Completion]] = [[(0,)] * 21 + [(2,)] * 9]
    assert compare(baseline, candidate, np.random.default_rng(0), 199).pooled_p == 1.0
    baseline, candidate = [[(0,)] * 20 + [(1,)] * 10], [[(0,)] * 20 + [(2,)] * 10]
    assert compare(baseline, candidate, np.random.default_rng(0), 199).pooled_p < 0.05


def test_statistic_by_hand() -> None:
    """Σ (a − b)² ÷ (a + b): 20 against 10 of one token, 10 against 20 of another one."""
    completions: list[Completion] = [(1,)] * 20 + [(2,)] * 10 + [(1,)] * 10 + [(2,)] * 20
    deal = np.array([[1] * 30 + [0] * 30], dtype=np.float32)
    assert _score(completions, deal) == pytest.approx([2 * 10**2 / 30])
