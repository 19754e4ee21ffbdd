"""Which figures may not be reported, and why.

A figure that these guards withhold is null in the JSON and "refused" in the table. The rules, per arm: a request
failed; the prefix cache served timed prompts; the engine served somebody else meanwhile; answers ended early that were
not to. Between arms: they saw different prompt tokens or gave different lengths; a configured drafter never drafted;
the run was cut short (someone who may stop when the figures look good would bias them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, Run, counter_delta
from laguna_serve.bench.harness.schedule import Plan
from laguna_serve.bench.stats.intervals import MIN_UNITS
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.records import Record

MIN_PAIRS = MIN_UNITS

SPEEDUP = "speedup"
INTERVAL = "speedup.ci95"
ACCEPTANCE = "acceptance"
PARITY = "parity"
BOUND = "parity.bound95"
CONTROL = "parity.control"


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """`figure` as a path in the JSON ("arms.baseline" stands for its tok_per_s, ttft_ms, itl_ms and e2e_ms)."""

    figure: str
    reason: str


def find_refusals(run: Run, plan: Plan, drafting: bool) -> list[Refusal]:
    """Every figure to withhold, each with each of its reasons. `drafting`: the candidate was given a drafter."""
    refusals = [*_judge_arms(run), *_judge_pairs(run, plan), *_judge_control(run), *_judge_ending(run, plan)]
    if drafting and (delta := counter_delta(run.arms[CANDIDATE])) is not None and delta.drafts == 0:
        reason = "a drafter was configured but never drafted"
        refusals += [Refusal(ACCEPTANCE, reason), Refusal(SPEEDUP, reason)]
    return list(dict.fromkeys(refusals))


def find_faults(name: str, arm: ArmRun) -> list[str]:
    """Why a pass is not to be used; `name` is what its arm is called."""
    failed = _describe_failures(name, [arm])
    return [*failed, *_doubt_counters(name, arm, bool(failed))]


def check_drafts(label: str, counted: Counters, gamma: int | None, *, by_url: bool) -> None:
    """Check that an engine drafted as it was meant to: `gamma` tokens in a step, or none at all (None).

    Of endpoints (`by_url`) nothing is known but their counters, so that these must show that very γ.

    Raises:
        MeasurementStoppedError: it did otherwise.
    """
    if gamma is None:
        if counted.drafts:
            expected = "expected plain decoding, got drafts counted; name an engine without a drafter"
            raise MeasurementStoppedError(f"{label}: {expected}")
        return
    if not counted.drafts:
        raise MeasurementStoppedError(f"{label}: expected drafts, got none counted; is the drafter served?")
    drafted = len(counted.accepted_per_position)
    if by_url and drafted not in (0, gamma):
        expected = f"expected drafts of {gamma} tokens, got {drafted} by its counters; give its own γ"
        raise MeasurementStoppedError(f"{label}: {expected}")


def _judge_arms(run: Run) -> Iterator[Refusal]:
    for name in ARMS:
        figures = [f"arms.{name}", SPEEDUP] + ([ACCEPTANCE] if name == CANDIDATE else [])
        passes = run.passes(name)
        failed = _describe_failures(name, passes)
        yield from (Refusal(figure, reason) for reason in failed for figure in [*figures, BOUND])
        doubts = [reason for arm in passes for reason in _doubt_counters(name, arm, bool(failed))]
        yield from (Refusal(figure, reason) for reason in doubts for figure in figures)


def _describe_failures(name: str, passes: Sequence[ArmRun]) -> list[str]:
    return _count_failed(name, [record for arm in passes for record in arm.records.values()])


def _judge_control(run: Run) -> Iterator[Refusal]:
    yield from (Refusal(CONTROL, reason) for reason in _count_failed("control", run.arms[BASELINE].control))


def _count_failed(name: str, records: Sequence[Record]) -> list[str]:
    failed = [record for record in records if record.error is not None]
    if not failed:
        return []
    return [f"{len(failed)} of the {name}'s requests failed (prompt {failed[0].prompt_id}: {failed[0].error})"]


def _doubt_counters(name: str, arm: ArmRun, failed: bool) -> Iterator[str]:
    delta = counter_delta(arm)
    if delta is None:
        return
    if delta.prefix_cache_hits:
        yield f"the prefix cache served {delta.prefix_cache_hits} tokens of the {name}'s timed prompts"
    if failed or arm.cut:
        return  # what a failed or broken-off request added to the counters is unknown
    tokens = sum(len(record.token_ids) for record in arm.records.values())
    if delta.generation_tokens > tokens or delta.requests > len(arm.records):
        yield (
            f"the {name} served more than this benchmark's requests: {delta.generation_tokens} tokens in "
            f"{delta.requests} requests counted, {tokens} in {len(arm.records)} sent here"
        )
    elif delta.generation_tokens < tokens:
        yield (
            f"the {name}'s counters cover {delta.generation_tokens} of {tokens} tokens: "
            "they were reset, or are not those of the engine that answered"
        )


def _judge_pairs(run: Run, plan: Plan) -> Iterator[Refusal]:
    baseline, candidate = (run.arms[name].records for name in ARMS)
    shared = [
        (baseline[prompt_id], candidate[prompt_id])
        for prompt_id in baseline.keys() & candidate.keys()
        if baseline[prompt_id].error is None and candidate[prompt_id].error is None
    ]
    inputs = sum(left.prompt_sha256 != right.prompt_sha256 for left, right in shared)
    if inputs:
        reason = f"the arms saw different prompt tokens on {inputs} prompts"
        yield from (Refusal(figure, reason) for figure in (SPEEDUP, PARITY, BOUND))
    lengths = sum(len(left.token_ids) != len(right.token_ids) for left, right in shared)
    if lengths and not plan.stop_at_eos:  # else each arm's own tokens are counted, and where they part is in parity
        yield Refusal(SPEEDUP, f"the arms' answers differ in length on {lengths} prompts")
    if not plan.stop_at_eos:
        yield from (Refusal(SPEEDUP, reason) for name in ARMS for reason in _find_early_ends(name, run, plan))


def _find_early_ends(name: str, run: Run, plan: Plan) -> Iterator[str]:
    """Say where an arm's answers are shorter than they were asked to be, as of an endpoint that ends them itself."""
    asked = {prompt.id: min(prompt.max_tokens or plan.max_tokens, plan.max_tokens) for prompt in plan.prompts}
    records = [record for arm in run.passes(name) for record in arm.records.values() if record.error is None]
    early = [record for record in records if len(record.token_ids) < asked[record.prompt_id]]
    if early:
        first = early[0]
        yield (
            f"{len(early)} of the {name}'s answers ended before the tokens that were asked for (prompt "
            f"{first.prompt_id}: {len(first.token_ids)} of {asked[first.prompt_id]}): ignore_eos is not obeyed"
        )


def _judge_ending(run: Run, plan: Plan) -> Iterator[Refusal]:
    pairs = len(run.arms[BASELINE].rounds.keys() & run.arms[CANDIDATE].rounds.keys())
    counted = all(counter_delta(arm) is not None for name in ARMS for arm in run.passes(name))
    lasted = run.interleaved or (run.again is not None and len(run.again.rounds) == len(plan.rounds))
    if pairs < len(plan.rounds) or not counted or not lasted:
        reason = f"the run ended early ({run.stopped}): {pairs} of {len(plan.rounds)} rounds ran on both arms"
        reason += "" if lasted else ", and the baseline's last pass, which shows a drift, is not whole"
        reason += "" if counted else ", and not all counters could be read after them"
        yield from (Refusal(figure, reason) for figure in (SPEEDUP, ACCEPTANCE))
    elif pairs < MIN_PAIRS:
        yield Refusal(INTERVAL, f"an interval needs at least {MIN_PAIRS} pairs of rounds, got {pairs}")
    for name in ARMS:
        if not run.arms[name].rounds:
            yield Refusal(f"arms.{name}", f"the run ended early ({run.stopped}): the {name} ran no round")
