"""Does acceptance fall from one scenario to another? Ratios with their intervals; pure."""

from __future__ import annotations

from laguna_serve.bench.prefix.result import FALLS, HOLDS, ComparisonResult, ScenarioResult
from laguna_serve.bench.prefix.runner import Outcome
from laguna_serve.bench.prefix.traffic import Comparison
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup
from laguna_serve.serving.client.counters import summarise_acceptance

# Acceptance "falls" when even the upper end of the interval of the ratio is below this.
FALLS_BELOW = 0.95
# Chunks of a stream and vLLM's counters must show about the same acceptance, or intervals from chunks mean nothing.
# The last chunk is cut off at max_tokens, where the counters still see what was accepted: some per cent at 10 steps.
AGREEMENT = 0.1


def describe(outcome: Outcome) -> ScenarioResult:
    """One scenario: acceptance by the counters and by the chunks, hits, preemptions."""
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
        hit_rate=delta.prefix_cache_hits / delta.prefix_cache_queries if delta.prefix_cache_queries else 0.0,
        preemptions=delta.preemptions,
    )


def compare(comparison: Comparison, outcome: Outcome, against: Outcome, seed: int) -> ComparisonResult:
    """The ratio of acceptance lengths with its interval, and the verdict.

    Pairs are prompts, of a greedy group all copies together, as they say the same; sampled copies are draws of their
    own. The tokens after the first chunk stand for a rate's numerator, the steps for its seconds.
    """
    samples = (side.steps if side.scenario.sampled else _by_prompt(side) for side in (against, outcome))
    sides = zip(*samples, strict=True)
    pairs = [RoundPair(b, float(b_steps), a, float(a_steps)) for (b, b_steps), (a, a_steps) in sides]
    here, there = (summarise_acceptance(side.delta) for side in (outcome, against))
    ratio = None if here is None or there is None else here.length / there.length
    ci95, by_chunks = bootstrap_speedup(pairs, seed), pool_speedup(pairs)
    differing = sum(a.token_ids != b.token_ids for a, b in zip(outcome.records, against.records, strict=True))
    return ComparisonResult(
        name=comparison.name,
        scenario=comparison.scenario,
        against=comparison.against,
        provoked_by=comparison.provoked_by,
        ratio=ratio,
        ratio_by_chunks=by_chunks,
        ci95=ci95,
        pairs=len(pairs),
        differing=None if outcome.scenario.sampled else differing,
        verdict=_judge(comparison, outcome, ratio, by_chunks, ci95[1]),
    )


def _judge(comparison: Comparison, outcome: Outcome, ratio: float | None, by_chunks: float, high: float) -> str:
    if comparison.provoked_by is not None and getattr(outcome.delta, comparison.provoked_by) <= 0:
        return f"not provoked: {comparison.provoked_by} stayed 0"
    if ratio is None or abs(by_chunks / ratio - 1) > AGREEMENT:
        return f"withheld: chunks say {by_chunks:.3f}, vLLM's counters {ratio}"
    return HOLDS if high >= FALLS_BELOW else FALLS


def _by_prompt(outcome: Outcome) -> list[tuple[int, int]]:
    """Tokens and steps of every prompt; the copies in a group count together."""
    by_prompt: dict[str, list[int]] = {}
    for prompt, (tokens, steps) in zip(outcome.scenario.prompts, outcome.steps, strict=True):
        sums = by_prompt.setdefault(prompt.text, [0, 0])
        sums[0] += tokens
        sums[1] += steps
    return [(tokens, steps) for tokens, steps in by_prompt.values()]
