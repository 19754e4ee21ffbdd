"""One point of a γ sweep: an A/B with both engines up, its cost per step, and what of a step is the drafter's."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from laguna_serve.bench.harness.arms import Arm, ArmSpec
from laguna_serve.bench.harness.assemble import assemble, list_pairs
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.harness.runner import ArmRun, MeasurementStoppedError, Run, measure
from laguna_serve.bench.harness.schedule import ARMS, BASELINE, CANDIDATE, Plan, make_plan
from laguna_serve.bench.stats.intervals import chunk_gaps_ms
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress

MIN_WARMUP = 4


def make_config(args: argparse.Namespace, gamma: int | None) -> EngineConfig:
    """The engine of a γ, or of plain decoding (None), from the sweep's flags."""
    return EngineConfig(
        model=args.model,
        draft=None if gamma is None else args.draft,
        gamma=gamma,
        dtype=args.dtype,
        enforce_eager=args.eager,
        prefix_caching=False,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
    )


def make_spec(args: argparse.Namespace, gamma: int | None) -> ArmSpec:
    """The baseline (None), or the candidate of a γ."""
    config = make_config(args, gamma)
    if gamma is None:
        return ArmSpec(BASELINE, f"{args.model}; no drafter", config=config)
    return ArmSpec(CANDIDATE, f"{args.model}; drafter {args.draft}, γ {gamma}", config=config)


def measure_point(
    args: argparse.Namespace,
    gamma: int,
    concurrency: int,
    prompts: list[Prompt],
    arms: tuple[Arm, Arm],
    progress: Progress,
) -> dict[str, Any]:
    """The figures of ab.py for (plain, speculating) arms, the rounds, the cost of a step and the drafter's share of it.

    Raises:
        MeasurementStoppedError: a figure was withheld.
    """
    timed, warmup = split_prompts(prompts, args.num_prompts, max(MIN_WARMUP, concurrency))
    plan = make_plan(
        timed, warmup, max_tokens=args.max_tokens, concurrency=concurrency, control=concurrency, seed=args.seed
    )
    result, run = measure_plan(args, plan, arms, progress, drafting=True)
    pairs = [(p.baseline_tokens, p.baseline_s, p.candidate_tokens, p.candidate_s) for p in list_pairs(run).values()]
    baseline, candidate = result.arms[BASELINE], result.arms[CANDIDATE]
    assert baseline.chunk_gap_ms is not None
    assert candidate.chunk_gap_ms is not None
    step_ms = candidate.chunk_gap_ms.mean
    parity = msgspec.to_builtins(result.parity)
    rows_ms = asyncio.run(_measure_rows(arms[0], timed, concurrency * (gamma + 1), args.max_tokens))
    return {
        "gamma": gamma,
        "concurrency": concurrency,
        "speedup": result.speedup.point,
        "ci95": result.speedup.ci95,
        "tau": result.acceptance.length,
        "per_position": result.acceptance.per_position,
        "step_cost": step_ms / baseline.chunk_gap_ms.mean,
        "draft_share": None if rows_ms is None else max(0.0, 1 - rows_ms / step_ms),
        "tok_per_s": {BASELINE: baseline.tok_per_s, CANDIDATE: candidate.tok_per_s},
        "memory": {name: msgspec.to_builtins(result.arms[name].memory) for name in ARMS},
        "parity": {key: value for key, value in parity.items() if key != "divergences"},
        "divergences": parity["divergences"],
        "pairs": pairs,
    }


def measure_plan(
    args: argparse.Namespace, plan: Plan, arms: tuple[Arm, Arm], progress: Progress, *, drafting: bool
) -> tuple[AbResult, Run]:
    """Run a plan on two arms that are up. Raises MeasurementStoppedError when a figure was withheld."""
    run = Run({arm.name: ArmRun(arm.spec.label) for arm in arms})
    asyncio.run(measure(plan, arms, run, progress))
    environment = Environment(date="", command="")  # the sweep's own result has it
    result = assemble(run, plan, environment, dtype=args.dtype, drafting=drafting, prompts_file=args.prompts)
    if result.refused:
        reasons = "; ".join(sorted({refusal.reason for refusal in result.refused}))
        raise MeasurementStoppedError(f"{arms[1].spec.label}: {reasons}")
    return result, run


async def _measure_rows(arm: Arm, prompts: Sequence[Prompt], rows: int, max_tokens: int) -> float | None:
    """Mean ms of a plain step over so many rows, as many sequences decoding together: what verifying them takes, and
    what a speculative step takes beyond it is the drafter's. None with fewer prompts than rows."""
    if rows > len(prompts):
        return None
    async with open_session() as session:
        model_name = arm.model_name or await find_model_name(session, arm.base_url)
        records = await Client(session, arm.base_url, model_name, max_tokens).run_round(prompts[:rows])
    # From when the last prompt has been read to when the first answer ends, all rows are in every step.
    begin = max(record.chunk_ns[0] for record in records)
    end = min(record.chunk_ns[-1] for record in records)
    gaps = [
        gap
        for record in records
        for gap, ns in zip(chunk_gaps_ms(record.chunk_ns), record.chunk_ns[1:], strict=True)
        if begin < ns <= end
    ]
    return float(sum(gaps) / len(gaps)) if gaps else None
