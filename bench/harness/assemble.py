"""Turns a run into the result of an A/B; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

import msgspec
from msgspec import UNSET

from laguna_serve.bench.harness.result import (
    AbResult,
    ArmAcceptance,
    ArmRequests,
    ArmResult,
    ControlResult,
    Parity,
    RoundSpeedup,
    Speedup,
    Withheld,
    Workload,
)
from laguna_serve.bench.harness.runner import ArmRun, Run, counter_delta, wall_s
from laguna_serve.bench.harness.schedule import ARMS, BASELINE, CANDIDATE, Plan
from laguna_serve.bench.harness.validity import (
    ACCEPTANCE,
    BOUND,
    INTERVAL,
    PARITY,
    SPEEDUP,
    find_refusals,
)
from laguna_serve.bench.stats import intervals
from laguna_serve.bench.stats.intervals import Spread
from laguna_serve.bench.stats.parity import NOISE_MULTIPLE, Verdict, classify, find_mismatch, measure_noise
from laguna_serve.serving.client.counters import Counters, summarise_acceptance
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.kit.environment import Environment


def assemble(
    run: Run, plan: Plan, environment: Environment, *, dtype: str, drafting: bool, prompts_file: str
) -> AbResult:
    """The full result. `dtype`: the models' ("bfloat16", …), which bounds the noise of their logits."""
    refusals = find_refusals(run, plan, drafting)
    withheld = {refusal.figure for refusal in refusals}
    return AbResult(
        partial=run.stopped is not None,
        stopped=run.stopped,
        environment=environment,
        workload=Workload(
            prompts_file=prompts_file,
            prompts=len(plan.prompts),
            max_tokens=plan.max_tokens,
            concurrency=plan.concurrency,
            seed=plan.seed,
            interleaved=run.interleaved,
            ignore_eos=not plan.stop_at_eos,
            chat_prompts=sum(prompt.chat is not None for prompt in plan.prompts),
        ),
        arms={name: _describe_arm(run.arms[name], f"arms.{name}" in withheld) for name in ARMS},
        speedup=_describe_speedup(run, plan, withheld),
        parity=_describe_parity(run, dtype, withheld),
        acceptance=_describe_acceptance(None if ACCEPTANCE in withheld else counter_delta(run.arms[CANDIDATE])),
        forced_acceptance=UNSET if (forced := run.arms[CANDIDATE].forced) is None else _describe_acceptance(forced),
        refused=[Withheld(figure=refusal.figure, reason=refusal.reason) for refusal in refusals],
        requests={
            name: ArmRequests(
                timed=[record.freeze() for record in run.arms[name].records.values()],
                control=[record.freeze() for record in run.arms[name].control],
            )
            for name in ARMS
        },
    )


def list_pairs(run: Run) -> dict[int, intervals.RoundPair]:
    """Rounds that both arms completed without a failure, by index."""
    pairs: dict[int, intervals.RoundPair] = {}
    baseline_rounds, candidate_rounds = (run.arms[name].rounds for name in ARMS)
    for index in sorted(baseline_rounds.keys() & candidate_rounds.keys()):
        baseline, candidate = baseline_rounds[index], candidate_rounds[index]
        if all(record.error is None for record in [*baseline, *candidate]):
            pairs[index] = intervals.RoundPair(
                _count_tokens(baseline), wall_s(baseline), _count_tokens(candidate), wall_s(candidate)
            )
    return pairs


def _count_tokens(records: list[Record]) -> int:
    return sum(len(record.token_ids) for record in records)


def _describe_arm(arm: ArmRun, withheld: bool) -> ArmResult:
    records = [record for record in arm.records.values() if record.error is None]
    timed_s = sum(wall_s(records) for records in arm.rounds.values())
    tokens = sum(len(record.token_ids) for record in records)
    return ArmResult(
        label=arm.label,
        command=arm.command,
        requests=len(arm.records),
        failed=len(arm.records) - len(records),
        output_tokens=tokens,
        wall_s=timed_s,
        tok_per_s=tokens / timed_s if tokens and not withheld else None,
        **_summarise_times([] if withheld else records),
        memory=arm.memory,
        counters=counter_delta(arm),
        ended=sum(record.finish_reason == "stop" for record in records),
    )


def _summarise_times(records: list[Record]) -> dict[str, Spread | None]:
    """The times of an ArmResult by name."""
    return {
        "ttft_ms": intervals.summarise([(record.chunk_ns[0] - record.started_ns) / 1e6 for record in records]),
        "itl_ms": intervals.summarise(
            [gap for record in records for gap in intervals.token_gaps_ms(record.chunk_ns, record.chunk_tokens)]
        ),
        "chunk_gap_ms": intervals.summarise(
            [gap for record in records for gap in intervals.chunk_gaps_ms(record.chunk_ns)]
        ),
        "tokens_per_chunk": intervals.summarise([count for record in records for count in record.chunk_tokens]),
        "e2e_ms": intervals.summarise([(record.chunk_ns[-1] - record.started_ns) / 1e6 for record in records]),
    }


def _describe_speedup(run: Run, plan: Plan, withheld: Set[str]) -> Speedup:
    pairs = list_pairs(run)
    refused = SPEEDUP in withheld
    bounded = not refused and INTERVAL not in withheld
    names = ["+".join(prompt.id for prompt in prompts) for prompts in plan.rounds]
    return Speedup(
        point=None if refused else intervals.pool_speedup(list(pairs.values())),
        ci95=intervals.bootstrap_speedup(list(pairs.values()), plan.seed) if bounded else None,
        pairs=len(pairs),
        per_round=[
            RoundSpeedup(prompts=names[index], speedup=None if refused else pair.speedup, first=plan.orders[index][0])
            for index, pair in pairs.items()
        ],
    )


def _describe_parity(run: Run, dtype: str, withheld: Set[str]) -> Parity:
    verdicts, noise = _classify_all(run, dtype)
    refused = PARITY in withheld
    prompts = sum(
        record.error is None and (other := run.arms[CANDIDATE].records.get(prompt_id)) is not None and not other.error
        for prompt_id, record in run.arms[BASELINE].records.items()
    )
    bounded = prompts > 0 and not refused and BOUND not in withheld
    classes = Counter(verdict.classification for verdict in verdicts)
    return Parity(
        prompts=prompts,
        mismatches=None if refused else len(verdicts),
        bound95=intervals.bound_mismatch_rate(len(verdicts), prompts) if bounded else None,
        classes=None if refused else {name: classes[name] for name in ("tie", "near_tie", "defect")},
        noise_nats=noise,
        noise_multiple=NOISE_MULTIPLE,
        dtype=dtype,
        control=_compare_control(run.arms[BASELINE]),
        divergences=[] if refused else verdicts,
    )


def _classify_all(run: Run, dtype: str) -> tuple[list[Verdict], float | None]:
    """The verdict on every mismatch, and the noise they were judged by (None when nothing was re-requested)."""
    baseline, candidate = (run.arms[name] for name in ARMS)
    both = [prompt_id for prompt_id in baseline.probes if prompt_id in candidate.probes]
    probes = {prompt_id: (baseline.probes[prompt_id], candidate.probes[prompt_id]) for prompt_id in both}
    noise = measure_noise(probes.values(), dtype)
    verdicts = []
    for prompt_id in run.mismatched:
        answers = baseline.records[prompt_id], candidate.records[prompt_id]
        mismatch = find_mismatch(*answers)
        assert mismatch is not None
        verdicts.append(classify(mismatch, *answers, probes.get(prompt_id), noise))
    return verdicts, noise if probes else None


def _compare_control(arm: ArmRun) -> ControlResult | None:
    """The baseline against itself; None when it did not run."""
    timed = arm.records
    pairs = [(timed[again.prompt_id], again) for again in arm.control if again.error is None]
    pairs = [(first, again) for first, again in pairs if first.error is None]
    if not pairs:
        return None
    mismatches = sum(find_mismatch(first, again) is not None for first, again in pairs)
    return ControlResult(prompts=len(pairs), mismatches=mismatches)


def _describe_acceptance(delta: Counters | None) -> ArmAcceptance:
    acceptance = None if delta is None else summarise_acceptance(delta)
    return ArmAcceptance() if acceptance is None else msgspec.convert(acceptance, ArmAcceptance, from_attributes=True)
