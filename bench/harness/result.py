"""Turns a run into the result object (schema "laguna_serve.ab/1"); pure.

Figures that guards.py withholds are null. `shorten` makes the one-line form: the same object without the long lists.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from laguna_serve.bench.harness.runner import ArmRun, Run, wall_s
from laguna_serve.bench.harness.schedule import ARMS, BASELINE, CANDIDATE, Plan
from laguna_serve.bench.harness.validity import ACCEPTANCE, BOUND, INTERVAL, PARITY, SPEEDUP, count_moved, find_refusals
from laguna_serve.bench.stats import intervals
from laguna_serve.bench.stats.parity import NOISE_MULTIPLE, Verdict, classify, find_mismatch, measure_noise
from laguna_serve.serving.client.counters import summarise_acceptance
from laguna_serve.serving.client.records import Record

SCHEMA = "laguna_serve.ab/1"
LINE_DIVERGENCES = 5


def assemble(
    run: Run, plan: Plan, environment: dict[str, Any], *, dtype: str, drafting: bool, prompts_file: str
) -> dict[str, Any]:
    """The full result. `dtype`: the models' ("bfloat16", …), which bounds the noise of their logits."""
    refusals = find_refusals(run, plan, drafting)
    withheld = {refusal.figure for refusal in refusals}
    return {
        "schema": SCHEMA,
        "partial": run.stopped is not None,
        "stopped": run.stopped,
        "environment": environment,
        "workload": {
            "prompts_file": prompts_file,
            "prompts": len(plan.prompts),
            "max_tokens": plan.max_tokens,
            "concurrency": plan.concurrency,
            "temperature": 0,
            "ignore_eos": True,
            "seed": plan.seed,
            "interleaved": run.interleaved,
        },
        "arms": {name: _describe_arm(run.arms[name], f"arms.{name}" in withheld) for name in ARMS},
        "speedup": _describe_speedup(run, plan, withheld),
        "parity": _describe_parity(run, dtype, withheld),
        "acceptance": _describe_acceptance(run, ACCEPTANCE in withheld),
        "refused": [{"figure": refusal.figure, "reason": refusal.reason} for refusal in refusals],
        "requests": {
            name: {
                "timed": [record.to_json() for record in run.arms[name].records.values()],
                "control": [record.to_json() for record in run.arms[name].control],
            }
            for name in ARMS
        },
    }


def shorten(result: dict[str, Any]) -> dict[str, Any]:
    """The result without per-request lists, and with the first few divergences only (`mismatches` counts them all)."""
    short = {key: value for key, value in result.items() if key != "requests"}
    parity = result["parity"]
    short["parity"] = {**parity, "divergences": parity["divergences"][:LINE_DIVERGENCES]}
    short["speedup"] = {key: value for key, value in result["speedup"].items() if key != "per_round"}
    return short


def list_pairs(run: Run) -> dict[int, intervals.RoundPair]:
    """Rounds that both arms completed without a failure, by index."""
    pairs: dict[int, intervals.RoundPair] = {}
    baseline, candidate = (run.arms[name].rounds for name in ARMS)
    for index in sorted(baseline.keys() & candidate.keys()):
        ours, theirs = baseline[index], candidate[index]
        if all(record.error is None for record in [*ours, *theirs]):
            pairs[index] = intervals.RoundPair(_count_tokens(ours), wall_s(ours), _count_tokens(theirs), wall_s(theirs))
    return pairs


def _count_tokens(records: list[Record]) -> int:
    return sum(len(record.token_ids) for record in records)


def _describe_arm(arm: ArmRun, refused: bool) -> dict[str, Any]:
    records = [record for record in arm.records.values() if record.error is None]
    moved = count_moved(arm)
    timed_s = sum(wall_s(records) for records in arm.rounds.values())
    tokens = sum(len(record.token_ids) for record in records)
    figures = _summarise_times(records) if not refused else dict.fromkeys(_summarise_times([]))
    return {
        "label": arm.label,
        "command": arm.command,
        "requests": len(arm.records),
        "failed": len(arm.records) - len(records),
        "output_tokens": tokens,
        "wall_s": timed_s,
        "tok_per_s": tokens / timed_s if tokens and not refused else None,
        **figures,
        "memory": arm.memory,
        "counters": None if moved is None else {name: getattr(moved, name) for name in moved.__slots__},
    }


def _summarise_times(records: list[Record]) -> dict[str, Any]:
    """TTFT: sent → first token. ITL: per token, a chunk's gap spread over its tokens. E2E: sent → last token."""
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


def _describe_speedup(run: Run, plan: Plan, withheld: set[str]) -> dict[str, Any]:
    pairs = list_pairs(run)
    refused = SPEEDUP in withheld
    names = ["+".join(prompt.id for prompt in prompts) for prompts in plan.rounds]
    return {
        "point": None if refused else intervals.pool_speedup(list(pairs.values())),
        "ci95": None
        if refused or INTERVAL in withheld
        else list(intervals.bootstrap_speedup(list(pairs.values()), plan.seed)),
        "pairs": len(pairs),
        "per_round": [
            {"prompts": names[index], "speedup": None if refused else pair.speedup, "first": plan.orders[index][0]}
            for index, pair in pairs.items()
        ],
    }


def _describe_parity(run: Run, dtype: str, withheld: set[str]) -> dict[str, Any]:
    verdicts, noise = _classify_all(run, dtype)
    refused = PARITY in withheld
    prompts = sum(
        record.error is None and (other := run.arms[CANDIDATE].records.get(prompt_id)) is not None and not other.error
        for prompt_id, record in run.arms[BASELINE].records.items()
    )
    bounded = prompts > 0 and not refused and BOUND not in withheld
    classes = Counter(verdict.classification for verdict in verdicts)
    return {
        "prompts": prompts,
        "mismatches": None if refused else len(verdicts),
        "bound95": intervals.bound_mismatch_rate(len(verdicts), prompts) if bounded else None,
        "classes": None if refused else {name: classes[name] for name in ("tie", "near_tie", "defect")},
        "noise_nats": noise,
        "noise_multiple": NOISE_MULTIPLE,
        "dtype": dtype,
        "control": _compare_control(run.arms[BASELINE]),
        "divergences": [] if refused else [verdict.to_json() for verdict in verdicts],
    }


def _classify_all(run: Run, dtype: str) -> tuple[list[Verdict], float | None]:
    """The verdict on every mismatch, and the noise they were judged by (None when nothing was re-requested)."""
    baseline, candidate = (run.arms[name] for name in ARMS)
    both = [prompt_id for prompt_id in baseline.probes if prompt_id in candidate.probes]
    probes = {prompt_id: (baseline.probes[prompt_id], candidate.probes[prompt_id]) for prompt_id in both}
    noise = measure_noise(probes.values(), dtype)
    verdicts = []
    for prompt_id in run.mismatched:
        ours, theirs = baseline.records[prompt_id], candidate.records[prompt_id]
        mismatch = find_mismatch(ours, theirs)
        assert mismatch is not None
        verdicts.append(classify(mismatch, ours, theirs, probes.get(prompt_id), noise))
    return verdicts, noise if probes else None


def _compare_control(arm: ArmRun) -> dict[str, int] | None:
    """The baseline against itself; None when it did not run."""
    timed = arm.records
    pairs = [(timed[again.prompt_id], again) for again in arm.control if again.error is None]
    pairs = [(first, again) for first, again in pairs if first.error is None]
    if not pairs:
        return None
    return {
        "prompts": len(pairs),
        "mismatches": sum(find_mismatch(first, again) is not None for first, again in pairs),
    }


def _describe_acceptance(run: Run, refused: bool) -> dict[str, Any]:
    """Null figures when withheld, and when the candidate has no drafter."""
    moved = count_moved(run.arms[CANDIDATE])
    found = None if refused or moved is None else summarise_acceptance(moved)
    return found or dict.fromkeys(("length", "rate", "per_position", "drafts", "draft_tokens", "accepted_tokens"))
