"""The third path: which token the exact model prefers where two arms part.

The common prefix is teacher-forced, as token ids, through another engine (the baseline's checkpoint in float32, without
a drafter, eager): one prefill, no speculation, no batch of others, and rounding far below that of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import UNSET

from laguna_serve.bench.certificate.result import Divergence, LoadResult, Replayed, ReplaySummary
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.logprobs import Probe

# As many log-probabilities as vLLM gives (--max-logprobs).
LOGPROBS = 20
# Divergences replayed per arm and load; the first ones in the order of the prompts.
MAX_REPLAYED = 50

Prefix = tuple[int, ...]
Step = dict[int, float]


def list_questions(loads: Sequence[LoadResult], baseline: Sequence[Mapping[str, Probe]]) -> dict[Prefix, None]:
    """List the distinct prefixes to ask about, of `judge_load`'s results and the baseline's answers there."""
    return dict.fromkeys(prefix for _, prefix in _find_prefixes(loads, baseline))


async def ask(client: Client, prefixes: Sequence[Prefix], report: Callable[[int], None]) -> dict[Prefix, Step]:
    """Ask for the exact model's best LOGPROBS log-probabilities (nats) of the next token after each prefix.

    Args:
        client: with `max_tokens` 1.
    Raises:
        EndpointError: a request failed.
    """
    steps: dict[Prefix, Step] = {}
    for done, prefix in enumerate(prefixes, start=1):
        steps[prefix] = (await client.probe(prefix, LOGPROBS)).top[0]
        report(done)
    return steps


def attach(loads: Sequence[LoadResult], baseline: Sequence[Mapping[str, Probe]], steps: Mapping[Prefix, Step]) -> None:
    """Give each replayed divergence a `replay`: which arm's token the exact model prefers.

    That is "baseline", "candidate" or "neither", by how much the two tokens differ (nats; None where one is not among
    the best), and the best two.
    """
    for divergence, prefix in _find_prefixes(loads, baseline):
        if (step := steps.get(prefix)) is not None:
            divergence.replay = _judge(step, divergence)


def summarise(divergences: Sequence[Divergence]) -> ReplaySummary:
    """How often the exact model sided with whom, and the two-sided sign test's p: rounding sides with neither."""
    sides = [d.replay.preferred for d in divergences if d.replay is not UNSET]
    baseline, candidate = sides.count("baseline"), sides.count("candidate")
    return ReplaySummary(
        replayed=len(sides),
        baseline=baseline,
        candidate=candidate,
        neither=sides.count("neither"),
        sign_test_p=_sign_test(baseline, candidate),
    )


def _find_prefixes(
    loads: Sequence[LoadResult], baseline: Sequence[Mapping[str, Probe]]
) -> Iterator[tuple[Divergence, Prefix]]:
    for load, answers in zip(loads, baseline, strict=True):
        for comparison in (load.candidate, *load.controls.values()):
            for divergence in comparison.divergences[:MAX_REPLAYED]:
                if divergence.baseline_token is not None and divergence.candidate_token is not None:
                    probe = answers[divergence.prompt_id]
                    yield divergence, (*probe.prompt_ids, *probe.token_ids[: divergence.index])


def _judge(step: Step, divergence: Divergence) -> Replayed:
    best = sorted(step.items(), key=lambda item: -item[1])
    baseline, candidate = divergence.baseline_token, divergence.candidate_token
    assert baseline is not None
    assert candidate is not None
    return Replayed(
        preferred="baseline" if best[0][0] == baseline else "candidate" if best[0][0] == candidate else "neither",
        margin=abs(step[baseline] - step[candidate]) if baseline in step and candidate in step else None,
        top2=best[:2],
    )


def _sign_test(left: int, right: int) -> float | None:
    """Probability that a fair coin splits at least this unevenly; None without tosses."""
    from scipy.stats import binomtest  # half a second to import

    return float(binomtest(left, left + right).pvalue) if left + right else None
