"""Turns a run into the result of an A/B; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import msgspec
from msgspec import UNSET

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE
from laguna_serve.bench.harness.prompts import count_own_lengths
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
from laguna_serve.bench.harness.run import ArmRun, Run, counter_delta, wall_s
from laguna_serve.bench.harness.schedule import Plan
from laguna_serve.bench.harness.validity import (
    ACCEPTANCE,
    BOUND,
    CONTROL,
    INTERVAL,
    PARITY,
    SPEEDUP,
    find_refusals,
)
from laguna_serve.bench.stats import intervals
from laguna_serve.bench.stats.drift import Drift, find_drift, widen
from laguna_serve.bench.stats.intervals import RoundPair, Spread
from laguna_serve.bench.stats.parity import CLASSES, NOISE_MULTIPLE, Verdict, classify, find_mismatch, measure_noise
from laguna_serve.serving.client.counters import Counters, sum_counters, summarise_acceptance
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.kit.environment import Environment


def assemble(
    run: Run, plan: Plan, environment: Environment, *, dtype: str, drafting: bool, prompts_file: str
) -> AbResult:
    """Assemble the full result. `dtype`: the models' ("bfloat16", …), which bounds the noise of their logits.

    What the baseline's engine says of its dtype goes before it: of a hub id, or of a default, nobody else may know.
    """
    said = run.arms[BASELINE].figures
    dtype = (said and said.dtype) or dtype
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
            own_lengths=count_own_lengths(plan.prompts, plan.max_tokens),
            waves=plan.waves if plan.waves > 1 else UNSET,
            num_warmups=UNSET if plan.num_warmups is None else plan.num_warmups,
        ),
        arms={name: _describe_arm(run.passes(name), f"arms.{name}" in withheld) for name in ARMS},
        speedup=_describe_speedup(run, plan, withheld),
        drift=UNSET if SPEEDUP in withheld or (drift := see_drift(run, plan.seed)) is None else drift,
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


def list_pairs(run: Run) -> dict[int, RoundPair]:
    """List the rounds that both arms completed without a failure, by index.

    The baseline's are those of all its passes.
    """
    baselines, candidate = run.passes(BASELINE), run.arms[CANDIDATE]
    if not run.interleaved and run.again is None:
        return {}
    return {
        index: RoundPair(*_add_up(baselines, index), *_add_up([candidate], index))
        for index in sorted(candidate.rounds)
        if all(_is_sound(arm, index) for arm in (*baselines, candidate))
    }


def see_drift(run: Run, seed: int) -> Drift | None:
    """Say what the baseline's two passes show; None where there are no two, or a round failed in one of them."""
    first, again = run.arms[BASELINE], run.again
    if again is None or not first.rounds or first.rounds.keys() != again.rounds.keys():
        return None
    if not all(_is_sound(arm, index) for index in first.rounds for arm in (first, again)):
        return None
    return find_drift(
        [RoundPair(*_add_up([first], index), *_add_up([again], index)) for index in sorted(first.rounds)], seed
    )


def _is_sound(arm: ArmRun, index: int) -> bool:
    return index in arm.rounds and all(record.error is None for record in arm.rounds[index])


def _add_up(passes: Sequence[ArmRun], index: int) -> tuple[int, float]:
    """Tokens and seconds of a round."""
    rounds = [arm.rounds[index] for arm in passes]
    return sum(map(_count_tokens, rounds)), sum(map(wall_s, rounds))


def _count_tokens(records: list[Record]) -> int:
    return sum(len(record.token_ids) for record in records)


def _describe_arm(passes: Sequence[ArmRun], withheld: bool) -> ArmResult:
    everything = [record for arm in passes for record in arm.records.values()]
    records = [record for record in everything if record.error is None]
    timed_s = sum(wall_s(records) for arm in passes for records in arm.rounds.values())
    tokens = sum(len(record.token_ids) for record in records)
    deltas = [counter_delta(arm) for arm in passes]
    return ArmResult(
        label=passes[0].label,
        command=passes[0].command,
        requests=len(everything),
        failed=len(everything) - len(records),
        output_tokens=tokens,
        wall_s=timed_s,
        tok_per_s=tokens / timed_s if tokens and not withheld else None,
        **_summarise_times([] if withheld else records),
        memory=passes[0].memory,
        engine=passes[0].figures,
        counters=None if None in deltas else sum_counters([delta for delta in deltas if delta is not None]),
        ended=sum(record.finish_reason == "stop" for record in records),
    )


def _summarise_times(records: list[Record]) -> dict[str, Spread | None]:
    """Summarise the times of an ArmResult by name."""
    return {
        "ttft_ms": intervals.summarise([(record.chunk_ns[0] - record.started_ns) / 1e6 for record in records]),
        "itl_ms": intervals.summarise_parts(
            [intervals.token_gaps_ms(record.chunk_ns, record.chunk_tokens) for record in records]
        ),
        "chunk_gap_ms": intervals.summarise_parts([intervals.chunk_gaps_ms(record.chunk_ns) for record in records]),
        "tokens_per_chunk": intervals.summarise([count for record in records for count in record.chunk_tokens]),
        "e2e_ms": intervals.summarise([(record.chunk_ns[-1] - record.started_ns) / 1e6 for record in records]),
    }


def _describe_speedup(run: Run, plan: Plan, withheld: Set[str]) -> Speedup:
    pairs, drift = list_pairs(run), see_drift(run, plan.seed)
    refused = SPEEDUP in withheld
    bounded = not refused and INTERVAL not in withheld
    interval = intervals.bootstrap_speedup(list(pairs.values()), plan.seed) if bounded else None
    names = ["+".join(prompt.id for prompt in prompts) for prompts in plan.rounds]
    return Speedup(
        point=None if refused else intervals.pool_speedup(list(pairs.values())),
        ci95=None if interval is None else widen(interval, drift),
        pairs=len(pairs),
        per_round=[
            RoundSpeedup(prompts=names[index], speedup=None if refused else pair.speedup, first=plan.orders[index][0])
            for index, pair in pairs.items()
        ],
    )


def _describe_parity(run: Run, dtype: str, withheld: Set[str]) -> Parity:
    verdicts, noise = _classify_all(run, dtype)
    refused = PARITY in withheld
    baseline, candidate = (run.arms[name].records for name in ARMS)
    prompts = sum(
        record.error is None and (other := candidate.get(prompt_id)) is not None and not other.error
        for prompt_id, record in baseline.items()
    )
    if run.arms[BASELINE].sampled:
        prompts = 0  # none was compared
    bounded = prompts > 0 and not refused and BOUND not in withheld
    classes = Counter(verdict.classification for verdict in verdicts)
    return Parity(
        prompts=prompts,
        mismatches=None if refused else len(verdicts),
        bound95=intervals.bound_mismatch_rate(len(verdicts), prompts) if bounded else None,
        classes=None if refused else {name: classes[name] for name in CLASSES},
        noise_nats=noise,
        noise_multiple=NOISE_MULTIPLE,
        dtype=dtype,
        control=None if CONTROL in withheld else _compare_control(run.arms[BASELINE]),
        divergences=[] if refused else verdicts,
    )


def _classify_all(run: Run, dtype: str) -> tuple[list[Verdict], float | None]:
    """Give every mismatch its class, with the noise they were judged by (None when nothing was re-requested)."""
    baseline, candidate = (run.arms[name] for name in ARMS)
    both = [prompt_id for prompt_id in baseline.probes if prompt_id in candidate.probes]
    probes = {prompt_id: (baseline.probes[prompt_id], candidate.probes[prompt_id]) for prompt_id in both}
    noise = measure_noise(probes.values(), dtype)
    timed = baseline.records, candidate.records
    verdicts = []
    for prompt_id in run.mismatched:
        answers = timed[0][prompt_id], timed[1][prompt_id]
        mismatch = find_mismatch(*answers)
        assert mismatch is not None
        verdicts.append(classify(mismatch, *answers, probes.get(prompt_id), noise))
    return verdicts, noise if probes else None


def _compare_control(arm: ArmRun) -> ControlResult | None:
    """Compare the baseline with itself; None when it did not run."""
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
