"""Statistics against values worked out by hand, and the interval's coverage on synthetic data."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.bench.stats.intervals import (
    RoundPair,
    bootstrap_mean,
    bootstrap_pooled,
    bootstrap_speedup,
    bound_mismatch_rate,
    chunk_gaps_ms,
    pool_speedup,
    summarise,
    token_gaps_ms,
)
from laguna_serve.bench.stats.quartiles import find_quartiles
from laguna_serve.serving.client.counters import Counters, summarise_acceptance

MS = 1_000_000


def test_acceptance_length_counts_accepted_tokens() -> None:
    delta = Counters(drafts=10, draft_tokens=70, accepted_tokens=24, accepted_per_position=(9, 7, 4, 2, 1, 1, 0))
    acceptance = summarise_acceptance(delta)
    assert acceptance is not None
    assert acceptance.length == pytest.approx(3.4)  # 1 + 24/10
    assert acceptance.rate == pytest.approx(24 / 70)
    assert acceptance.per_position == pytest.approx([0.9, 0.7, 0.4, 0.2, 0.1, 0.1, 0.0])
    assert acceptance.length == pytest.approx(1 + sum(acceptance.per_position))
    assert delta.draft_tokens / delta.drafts + 1 == 8  # the mistake: always γ + 1


def test_nothing_drafted_has_no_acceptance() -> None:
    assert summarise_acceptance(Counters()) is None


def test_a_chunk_spreads_its_gap_over_its_tokens() -> None:
    times = [100 * MS, 110 * MS, 116 * MS, 140 * MS]
    assert chunk_gaps_ms(times).tolist() == [10, 6, 24]
    assert token_gaps_ms(times, [3, 1, 2, 4]).tolist() == [10, 3, 3, 6, 6, 6, 6]
    assert token_gaps_ms([5 * MS], [7]).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 9)), min_size=1, max_size=40))
def test_token_gaps_add_up_to_the_time_between_first_and_last_chunk(chunks: list[tuple[int, int]]) -> None:
    times = np.cumsum([gap for gap, _ in chunks]).tolist()
    counts = [count for _, count in chunks]
    gaps = token_gaps_ms(times, counts)
    assert len(gaps) == sum(counts[1:])
    assert gaps.sum() == pytest.approx((times[-1] - times[0]) / 1e6)


def test_summary_by_hand() -> None:
    spread = summarise([1.0, 2.0, 3.0, 4.0, 10.0])
    assert spread is not None
    assert (spread.mean, spread.p50, spread.max, spread.n) == (4.0, 3.0, 10.0, 5)
    assert spread.p90 == pytest.approx(7.6)  # between the 4th and 5th, six tenths of the way
    assert summarise([]) is None


def test_the_speedup_is_the_ratio_of_pooled_rates() -> None:
    pairs = [RoundPair(100, 1.0, 100, 0.5), RoundPair(100, 3.0, 100, 1.5)]
    assert pool_speedup(pairs) == pytest.approx(2.0)
    uneven = [RoundPair(100, 1.0, 100, 0.25), RoundPair(100, 4.0, 100, 4.0)]
    assert pool_speedup(uneven) == pytest.approx((200 / 4.25) / (200 / 5.0))  # not the mean of 4 and 1
    assert uneven[0].speedup == pytest.approx(4.0)


def test_the_interval_is_seeded_and_collapses_without_spread() -> None:
    same = [RoundPair(64, 1.0, 64, 0.5)] * 20
    assert bootstrap_speedup(same, seed=1) == pytest.approx((2.0, 2.0))
    spread = [RoundPair(64, 1.0, 64, 0.4 + 0.02 * i) for i in range(20)]
    assert bootstrap_speedup(spread, seed=1) == bootstrap_speedup(spread, seed=1)
    low, high = bootstrap_speedup(spread, seed=1)
    assert low < pool_speedup(spread) < high


def test_a_mean_and_a_pooled_ratio_have_the_same_intervals_as_rates_do() -> None:
    values = [0.5, 1.0, 1.5, 4.0]
    pairs = [RoundPair(1, 1.0, count, seconds) for count, seconds in ((1, 2.0), (3, 3.0), (6, 4.0), (5, 1.25))]
    tokens, seconds = [pair.candidate_tokens for pair in pairs], [pair.candidate_s for pair in pairs]
    assert bootstrap_pooled(tokens, seconds, seed=3) == bootstrap_speedup(pairs, seed=3)
    assert bootstrap_mean(values, seed=3) == bootstrap_pooled(values, [1.0] * 4, seed=3)
    assert bootstrap_mean([2.0], seed=3) == (2.0, 2.0)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=30), st.integers(0, 9))
def test_the_interval_lies_within_the_extreme_pairs(times: list[tuple[float, float]], seed: int) -> None:
    pairs = [RoundPair(64, baseline, 64, candidate) for baseline, candidate in times]
    low, high = bootstrap_speedup(pairs, seed, resamples=200)
    ratios = [pair.speedup for pair in pairs]
    assert min(ratios) * (1 - 1e-9) <= low <= high <= max(ratios) * (1 + 1e-9)


def test_ends_that_rounding_has_swapped_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = SimpleNamespace(low=np.nextafter(1.5, 2), high=1.5)
    monkeypatch.setattr("scipy.stats.bootstrap", lambda *_, **__: SimpleNamespace(confidence_interval=ends))
    low, high = bootstrap_speedup([RoundPair(64, 1.0, 64, 1.0)] * 2, 0)
    assert low == 1.5 < high


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials, covered = 300, 0
    for trial in range(trials):
        base = rng.lognormal(0.0, 0.15, 48)  # how slow the prompt is on both arms
        gain = rng.lognormal(np.log(1.6), 0.25, 48)  # what speculation gains on it
        pairs = [RoundPair(64, float(b), 64, float(b / g)) for b, g in zip(base, gain, strict=True)]
        low, high = bootstrap_speedup(pairs, seed=trial, resamples=600)
        # pooled rates: E[b] / E[b/g], and E[1/g] = exp(-mu + sigma²/2)
        covered += low <= 1.6 * np.exp(-(0.25**2) / 2) <= high
    assert 0.90 <= covered / trials <= 0.985


@pytest.mark.parametrize(
    ("mismatches", "prompts", "bound"),
    [
        (0, 20, 0.1391),  # 1 - 0.05^(1/20)
        (0, 500, 0.005974),
        (1, 20, 0.2161),  # Clopper–Pearson tables, one-sided 95%
        (2, 50, 0.1206),
        (5, 5, 1.0),
    ],
)
def test_the_mismatch_bound_is_exact(mismatches: int, prompts: int, bound: float) -> None:
    assert bound_mismatch_rate(mismatches, prompts) == pytest.approx(bound, abs=5e-5)


@given(st.integers(1, 3000))
def test_the_rule_of_three_lies_just_above_the_bound(prompts: int) -> None:
    bound = bound_mismatch_rate(0, prompts)
    assert bound == pytest.approx(1 - 0.05 ** (1 / prompts), rel=1e-9)
    assert bound < 3 / prompts


def test_the_interval_is_of_95_percent() -> None:
    """As the normal distribution has it: 1.96 standard errors to either side."""
    values = np.random.default_rng(0).normal(10.0, 1.0, 400)
    low, high = bootstrap_mean(values, seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)


@pytest.mark.parametrize(
    ("values", "quartiles"),
    [([5.0], (5.0, 5.0, 5.0)), ([4.0, 1.0, 3.0, 2.0], (1.75, 2.5, 3.25)), ([9.0, 1.0, 5.0, 7.0, 3.0], (3.0, 5.0, 7.0))],
)
def test_quartiles_by_hand(values: list[float], quartiles: tuple[float, float, float]) -> None:
    found = find_quartiles(values)
    assert (found.q25, found.median, found.q75) == quartiles
