"""The points of a γ sweep: an A/B with both engines up, its cost per step, and what of a step is the drafter's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.result import MeasuredPoint
from laguna_serve.bench.harness.arms import Arm, has_room_beside, open_arm
from laguna_serve.bench.harness.assemble import assemble, list_pairs
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.harness.runner import ArmRun, MeasurementStoppedError, Run, measure
from laguna_serve.bench.harness.schedule import ARMS, BASELINE, CANDIDATE, Plan, make_plan
from laguna_serve.bench.stats.intervals import chunk_gaps_ms
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import claim_folder

MIN_WARMUP = 4


def claim_points(config: SweepConfig, environment: Environment) -> None:
    """Take the folder of finished measurements. Raises RunDirError when it holds those of another sweep."""
    decisive = ("model", "draft", "num_prompts", "max_tokens", "dtype", "eager", "seed")
    settings = {name: getattr(config, name) for name in decisive} | {"prompts": str(config.prompts)}
    settings |= {name: value for name in ("chat", "thinking") if (value := getattr(config, name))}
    device = environment.device.name if environment.device is not None else None
    claim_folder(config.points, settings | {"versions": environment.versions, "device": device})


def read_points(folder: Path) -> list[MeasuredPoint]:
    """Every finished measurement, by γ and concurrency."""
    points = [read_result(path, MeasuredPoint) for path in folder.glob("gamma*-c*.json")]
    return sorted(points, key=lambda point: (point.gamma, point.concurrency))


def measure_missing(
    config: SweepConfig, gammas: Sequence[int], prompts: list[Prompt], progress: Progress
) -> dict[int, str]:
    """Measure the points that the folder lacks. Returns γ → what went wrong, for those that failed.

    Raises:
        EngineError: the baseline did not start or died, or there is no room beside it.
    """
    done = {(point.gamma, point.concurrency) for point in read_points(config.points)}
    missing = {gamma: [c for c in config.concurrency if (gamma, c) not in done] for gamma in gammas}
    missing = {gamma: concurrencies for gamma, concurrencies in missing.items() if concurrencies}
    if done:
        progress.say(f"continuing: {len(done)} points are there")
    failed: dict[int, str] = {}
    if not missing:
        return failed
    with ExitStack() as stack:
        baseline = stack.enter_context(open_arm(config.make_spec(None), config.points, progress.say))
        if not has_room_beside(baseline):
            raise EngineError("memory: expected room for two engines, got too little; pass a smaller --kv-cache-gib")
        for gamma, concurrencies in missing.items():
            try:
                with open_arm(config.make_spec(gamma), config.points, progress.say) as candidate:
                    for concurrency in concurrencies:
                        progress.say(f"γ {gamma}, concurrency {concurrency}")
                        point = measure_point(config, gamma, concurrency, prompts, (baseline, candidate), progress)
                        write_result(config.points / f"gamma{gamma}-c{concurrency}.json", point)
            except (EngineError, EndpointError, MeasurementStoppedError) as error:
                baseline.check()
                failed[gamma] = str(error)
                progress.say(f"γ {gamma} failed and is left out: {error}")
    return failed


def measure_point(
    config: SweepConfig,
    gamma: int,
    concurrency: int,
    prompts: list[Prompt],
    arms: tuple[Arm, Arm],
    progress: Progress,
) -> MeasuredPoint:
    """The figures of ab.py for (plain, speculating) arms, the rounds, the cost of a step and the drafter's share of it.

    Raises:
        MeasurementStoppedError: a figure was withheld.
    """
    timed, warmup = split_prompts(prompts, config.num_prompts, max(MIN_WARMUP, concurrency))
    plan = make_plan(
        timed, warmup, max_tokens=config.max_tokens, concurrency=concurrency, control=concurrency, seed=config.seed
    )
    result, run = measure_plan(config, plan, arms, progress, drafting=True)
    baseline, candidate = result.arms[BASELINE], result.arms[CANDIDATE]
    assert baseline.chunk_gap_ms is not None
    assert candidate.chunk_gap_ms is not None
    assert result.speedup.point is not None
    assert result.speedup.ci95 is not None
    assert result.acceptance.length is not None
    step_ms = candidate.chunk_gap_ms.mean
    rows_ms = asyncio.run(_measure_rows(arms[0], timed, concurrency * (gamma + 1), config.max_tokens))
    return MeasuredPoint(
        gamma=gamma,
        concurrency=concurrency,
        speedup=result.speedup.point,
        ci95=result.speedup.ci95,
        tau=result.acceptance.length,
        per_position=result.acceptance.per_position or [],
        step_cost=step_ms / baseline.chunk_gap_ms.mean,
        draft_share=None if rows_ms is None else max(0.0, 1 - rows_ms / step_ms),
        tok_per_s={name: result.arms[name].tok_per_s or 0.0 for name in ARMS},
        memory={name: result.arms[name].memory for name in ARMS},
        parity=result.parity.summarise(),
        divergences=result.parity.divergences,
        pairs=list(list_pairs(run).values()),
    )


def measure_plan(
    config: SweepConfig, plan: Plan, arms: tuple[Arm, Arm], progress: Progress, *, drafting: bool
) -> tuple[AbResult, Run]:
    """Run a plan on two arms that are up. Raises MeasurementStoppedError when a figure was withheld."""
    run = Run({arm.name: ArmRun(arm.spec.label) for arm in arms})
    asyncio.run(measure(plan, arms, run, progress))
    environment = Environment(date="", command="")  # the sweep's own result has it
    result = assemble(run, plan, environment, dtype=config.dtype, drafting=drafting, prompts_file=str(config.prompts))
    if result.refused:
        reasons = "; ".join(sorted({refusal.reason for refusal in result.refused}))
        raise MeasurementStoppedError(f"{arms[1].spec.label}: {reasons}")
    return result, run


async def _measure_rows(arm: Arm, prompts: Sequence[Prompt], rows: int, max_tokens: int) -> float | None:
    """Mean ms of a plain step over so many rows, as many sequences decoding together.

    That is what verifying them takes, and what a speculative step takes beyond it is the drafter's. None with fewer
    prompts than rows.
    """
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
