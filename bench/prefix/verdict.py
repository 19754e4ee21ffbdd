"""Does acceptance fall from one scenario to another? Ratios with their intervals; pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from laguna_serve.bench.harness.validity import MIN_PAIRS
from laguna_serve.bench.prefix.result import CANNOT_TELL, FALLS, HOLDS, ComparisonResult, ScenarioResult
from laguna_serve.bench.prefix.runner import Outcome
from laguna_serve.bench.prefix.traffic import Comparison
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup
from laguna_serve.serving.client.counters import summarise_acceptance

# Acceptance "falls" when even the upper end of the interval of the ratio is below this, and "holds" when the lower end
# is not. Of fewer than MIN_PAIRS, which carry no such interval, every pair's own ratio has to be on that side.
FALLS_BELOW = 0.95


def describe(outcome: Outcome, plain: Outcome | None = None) -> ScenarioResult:
    """One scenario: acceptance by the counters and by the chunks, hits (and those without a drafter), preemptions."""
    delta = outcome.delta
    acceptance = summarise_acceptance(delta)
    return ScenarioResult(
        name=outcome.scenario.name,
        engine=outcome.scenario.engine,
        requests=len(outcome.records),
        prompt_tokens=delta.prompt_tokens,
        acceptance=None if acceptance is None else acceptance.length,
        drafts=delta.drafts,
        per_position=None if acceptance is None else acceptance.per_position,
        tokens_per_chunk=outcome.chunk_length,
        hit_rate=_find_hit_rate(outcome),
        preemptions=delta.preemptions,
        plain_hit_rate=None if plain is None else _find_hit_rate(plain),
    )


def _find_hit_rate(outcome: Outcome) -> float:
    delta = outcome.delta
    return delta.prefix_cache_hits / delta.prefix_cache_queries if delta.prefix_cache_queries else 0.0


def compare(comparison: Comparison, outcome: Outcome, against: Outcome, seed: int) -> ComparisonResult:
    """Compare acceptance lengths: their ratio with its interval, and the verdict.

    A pair is what both scenarios have counted apart: a prompt, a group's copies, or the prompts that lost their blocks
    together. Its tokens (drafts + accepted) stand for a rate's numerator, its drafts for the seconds.
    """
    pairs = _pair_counters(outcome, against)
    ratio, ci95 = pool_speedup(pairs), bootstrap_speedup(pairs, seed)
    differing = sum(a.token_ids != b.token_ids for a, b in zip(outcome.records, against.records, strict=True))
    return ComparisonResult(
        name=comparison.name,
        scenario=comparison.scenario,
        against=comparison.against,
        provoked_by=comparison.provoked_by,
        ratio=ratio,
        ratio_by_chunks=outcome.chunk_length / against.chunk_length,
        ci95=ci95,
        pairs=len(pairs),
        differing=None if outcome.scenario.sampled else differing,
        verdict=_judge(comparison, outcome, pairs, ci95),
    )


def _judge(comparison: Comparison, outcome: Outcome, pairs: Sequence[RoundPair], ci95: tuple[float, float]) -> str:
    if comparison.provoked_by is not None and getattr(outcome.delta, comparison.provoked_by) <= 0:
        return f"not provoked: {comparison.provoked_by} stayed 0"
    if len(pairs) < MIN_PAIRS:
        keeps = {_keeps(pair) for pair in pairs}
        return CANNOT_TELL if len(keeps) != 1 else HOLDS if keeps == {True} else FALLS
    low, high = ci95
    return HOLDS if low >= FALLS_BELOW else FALLS if high < FALLS_BELOW else CANNOT_TELL


def _keeps(pair: RoundPair) -> bool:
    """Whether a pair's ratio is not below the limit; without a quotient, as there may be no draft."""
    return pair.candidate_tokens * pair.baseline_s >= FALLS_BELOW * pair.baseline_tokens * pair.candidate_s


def _pair_counters(outcome: Outcome, against: Outcome) -> list[RoundPair]:
    ends = [end for end in outcome.readings if end in against.readings]
    pairs = []
    for begin, end in pairwise(ends):
        before, after = (side.readings[end].since(side.readings[begin]) for side in (against, outcome))
        pairs.append(
            RoundPair(
                before.drafts + before.accepted_tokens,
                float(before.drafts),
                after.drafts + after.accepted_tokens,
                float(after.drafts),
            )
        )
    return pairs
