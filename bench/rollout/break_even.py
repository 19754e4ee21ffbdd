"""Does speculation pay for rollouts, and from which acceptance on? Figures of one measured point; pure.

A speculative step brings τ tokens of a sequence where a plain step brings one, so that the ratio of the rates is
τ ÷ c, with c what a speculative step costs in plain steps. c = τ ÷ ratio is therefore measured, everything included:
prompts, drafting, verifying, and the time in which a round waits for its last sequence. It is the break-even: at the
same batch, speculation pays while τ lies above it. Its interval is that of the ratio, with τ as measured; so τ lies
above, below or inside of it exactly when the ratio's interval lies above, below or around 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import UnsetType, structs

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE
from laguna_serve.bench.rollout.result import (
    INCONCLUSIVE,
    LOSES,
    PAYS,
    Estimate,
    MeasuredPoint,
    RolloutAcceptance,
    RolloutPoint,
    Turn,
)
from laguna_serve.bench.stats.drift import Drift, widen
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_pooled, bootstrap_speedup, pool_speedup
from laguna_serve.serving.client.counters import sum_counters, summarise_acceptance

START = "start"  # what people read for the policy that the drafter was trained for
PRICE = "price per million tokens = price per hour ÷ 3600 ÷ tok/s × 1,000,000"


def summarise_point(
    measured: MeasuredPoint, seed: int, price_per_hour: float | None = None, *, adaptive: bool = False
) -> RolloutPoint:
    """Rates, ratios with their 95% intervals, acceptance, break-even and verdict of a stored point.

    `adaptive`: steps differ, and have no break-even.
    """
    turns = measured.turns
    deltas = {name: sum_counters([turn.delta for turn in turns[name]]) for name in ARMS}
    ratio = compare_rates(turns[BASELINE], turns[CANDIDATE], "wall_s", measured.drift, seed)
    acceptance = summarise_acceptance(deltas[CANDIDATE])
    assert ratio is not None, "wall time passes"
    assert acceptance is not None or adaptive, "points without drafts are not stored"
    low, high = ratio.ci95
    rates = {name: find_rate(turns[name], "wall_s") for name in ARMS}
    per_device = compare_rates(turns[BASELINE], turns[CANDIDATE], "device_s", measured.drift, seed)
    return RolloutPoint(
        batch=measured.batch,
        version=measured.version,
        rounds=len(turns[BASELINE]),
        tokens=sum(turn.tokens for turn in turns[CANDIDATE]),
        tok_per_s=rates,
        ratio=ratio,
        tok_per_device_s={name: find_rate(turns[name], "device_s") for name in ARMS} if per_device else None,
        device_ratio=per_device,
        acceptance=None
        if acceptance is None
        else RolloutAcceptance(**structs.asdict(acceptance), ci95=find_tau_interval(turns[CANDIDATE], seed)),
        break_even=None
        if acceptance is None or adaptive
        else Estimate(point=acceptance.length / ratio.point, ci95=(acceptance.length / high, acceptance.length / low)),
        verdict=PAYS if low > 1 else LOSES if high < 1 else INCONCLUSIVE,
        cached_share={
            name: delta.prefix_cache_hits / max(1, delta.prefix_cache_queries) for name, delta in deltas.items()
        },
        preemptions={name: delta.preemptions for name, delta in deltas.items()},
        price_per_million=find_prices(rates, price_per_hour),
        drift=measured.drift,
    )


def compare_rates(
    baseline: Sequence[Turn], candidate: Sequence[Turn], clock: str, drift: Drift | UnsetType, seed: int
) -> Estimate | None:
    """Compare tokens per second with the baseline's by `clock` ("wall_s" or "device_s"), paired over rounds.

    None where a turn took less than the clock resolves.
    """
    if not all(getattr(turn, clock) > 0 for turn in (*baseline, *candidate)):
        return None
    pairs = [
        RoundPair(plain.tokens, getattr(plain, clock), speculative.tokens, getattr(speculative, clock))
        for plain, speculative in zip(baseline, candidate, strict=True)
    ]
    return Estimate(point=pool_speedup(pairs), ci95=widen(bootstrap_speedup(pairs, seed), drift))


def find_rate(turns: Sequence[Turn], clock: str) -> float:
    """Tokens per second by that clock, of all turns together."""
    return sum(turn.tokens for turn in turns) / sum(float(getattr(turn, clock)) for turn in turns)


def find_tau_interval(turns: Sequence[Turn], seed: int) -> tuple[float, float]:
    """95% percentile bootstrap interval of 1 + Σ accepted ÷ Σ drafts over rounds."""
    drafting = [turn.delta for turn in turns if turn.delta.drafts]  # an adaptive γ may be 0 for a whole round
    accepted, drafts = [delta.accepted_tokens for delta in drafting], [delta.drafts for delta in drafting]
    low, high = bootstrap_pooled(accepted, drafts, seed)
    return 1 + low, 1 + high


def find_prices(rates: Mapping[str, float], per_hour: float | None) -> dict[str, float] | None:
    """Find the price of a million tokens at each rate (tok/s), in the hour's currency; None without one."""
    return None if per_hour is None else {name: per_hour / 3600 / rate * 1e6 for name, rate in rates.items()}
