"""The points of a γ sweep: an A/B with both engines up or in turn, its cost per step, and the drafter's share of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.certificate.identity import digest_machine
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.passes import SweepPass, make_measure, measure_rows, open_passes
from laguna_serve.bench.gamma.result import MeasuredPoint
from laguna_serve.bench.harness.assemble import assemble, list_pairs
from laguna_serve.bench.harness.in_turn import Bracket, join_run, measure_in_turn
from laguna_serve.bench.harness.order import Load, Order, choose_order
from laguna_serve.bench.harness.prompts import fingerprint_prompts, split_prompts
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, Run, counter_delta
from laguna_serve.bench.harness.runner import measure
from laguna_serve.bench.harness.schedule import Plan, count_warmups, make_plan
from laguna_serve.bench.harness.validity import check_drafts
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING


def claim_points(config: SweepConfig, prompts: Sequence[Prompt], environment: Environment) -> None:
    """Take the folder of finished measurements.

    Raises:
        RunDirError: it holds those of another sweep, or of other code, another machine or its variables.
        EngineError, IdentityError: what computes here could not be found out.
    """
    decisive = ("model", "draft", "num_prompts", "max_tokens", "dtype", "eager", "seed")
    settings = {name: getattr(config, name) for name in decisive} | {"prompts": fingerprint_prompts(prompts)}
    settings |= {
        name: value
        for name in ("chat", "thinking", "temperature", "engine_args", "kv_cache_gib")
        if (value := getattr(config, name))
    }
    settings |= {} if config.waves == 1 else {"waves": config.waves}
    settings |= {} if config.num_warmups is None else {"num_warmups": config.num_warmups}
    settings |= {} if config.draft_sampling == DRAFT_SAMPLING[0] else {"draft_sampling": config.draft_sampling}
    settings |= {
        "checkpoints": [fingerprint(config.model), fingerprint(config.draft)],
        "versions": environment.versions,
        "device": environment.device.name if environment.device is not None else None,
    }
    settings |= {} if config.by_url else {"machine": digest_machine(environment, config.model)}
    claim_folder(config.points, settings | config.list_urls())


def read_points(folder: Path) -> list[MeasuredPoint]:
    """Every finished measurement, by γ and concurrency."""
    points = [read_result(path, MeasuredPoint) for path in folder.glob("gamma*-c*.json")]
    return sorted(points, key=lambda point: (point.gamma, point.concurrency))


def measure_missing(
    config: SweepConfig, gammas: Sequence[int], prompts: list[Prompt], progress: Progress
) -> dict[int, str]:
    """Measure the points that the folder lacks. Returns γ → what went wrong, for those that failed.

    Raises:
        EngineError: the baseline did not start or died.
    """
    done = {(point.gamma, point.concurrency) for point in read_points(config.points)}
    missing = {gamma: [c for c in config.concurrency if (gamma, c) not in done] for gamma in gammas}
    missing = {gamma: concurrencies for gamma, concurrencies in missing.items() if concurrencies}
    if done:
        progress.say(f"continuing: {len(done)} points are there")
    failed: dict[int, str] = {}
    if not missing:
        return failed
    order = choose_sweep_order(config, [config.make_spec(None), config.make_spec(max(missing))], prompts, progress)
    if not order.sequential:
        with open_arm(order.apply(config.make_spec(None)), config.points, progress.say) as baseline:
            if order.allows(baseline, progress.say):
                return _measure_beside(config, baseline, missing, prompts, order, progress)
    return measure_points_in_turn(config, missing, prompts, progress)


def choose_sweep_order(
    config: SweepConfig, specs: Sequence[ArmSpec], prompts: Sequence[Prompt], progress: Progress
) -> Order:
    """Choose whether two engines run together under this sweep's load."""
    load = Load.of(prompts, config.max_tokens, max(config.concurrency))
    return choose_order(specs, config.sequential, load, progress.say)


def _measure_beside(
    config: SweepConfig,
    baseline: Arm,
    missing: Mapping[int, Sequence[int]],
    prompts: list[Prompt],
    order: Order,
    progress: Progress,
) -> dict[int, str]:
    """Each γ beside the baseline, which is up."""
    failed: dict[int, str] = {}
    for gamma, concurrencies in missing.items():
        try:
            with open_arm(order.apply(config.make_spec(gamma)), config.points, progress.say) as candidate:
                for concurrency in concurrencies:
                    progress.say(f"γ {gamma}, concurrency {concurrency}")
                    point = measure_point(config, gamma, concurrency, prompts, (baseline, candidate), progress)
                    write_point(config, point)
        except (EngineError, EndpointError, MeasurementStoppedError) as error:
            baseline.check()
            failed[gamma] = str(error)
            progress.say(f"γ {gamma} failed and is left out: {error}")
    return failed


def measure_points_in_turn(
    config: SweepConfig, missing: Mapping[int, Sequence[int]], prompts: list[Prompt], progress: Progress
) -> dict[int, str]:
    """Plain decoding, each γ, and plain decoding again, one engine at a time; as `measure_missing`."""
    parts = {concurrency: f"c{concurrency}" for concurrency in config.concurrency}
    arms = {gamma: f"gamma{gamma}" for gamma in missing}
    plans = {part: plan_point(config, concurrency, prompts) for concurrency, part in parts.items()}
    rows = {part: [c * (gamma + 1) for gamma in missing if c in missing[gamma]] for c, part in parts.items()}
    specs = [config.make_spec(None), *(replace(config.make_spec(gamma), name=name) for gamma, name in arms.items())]
    wanted = {part: [arms[gamma] for gamma in missing if c in missing[gamma]] for c, part in parts.items()}
    passes = open_passes(config.points / "passes")
    said = measure_in_turn(specs, wanted, passes, make_measure(passes, plans, progress, rows), progress)
    failed = {gamma: said[name] for gamma, name in arms.items() if name in said}
    for gamma, concurrency in [(gamma, concurrency) for gamma, several in missing.items() for concurrency in several]:
        if (bracket := passes.find_bracket(arms[gamma], parts[concurrency])) is None:
            continue
        try:
            write_point(config, join_point(config, gamma, plans[parts[concurrency]], bracket, config.make_spec(gamma)))
        except MeasurementStoppedError as error:
            failed[gamma] = str(error)
    return failed


def write_point(config: SweepConfig, point: MeasuredPoint) -> None:
    """File a point where the next run finds it."""
    write_result(config.points / f"gamma{point.gamma}-c{point.concurrency}.json", point)


def plan_point(config: SweepConfig, concurrency: int, prompts: Sequence[Prompt]) -> Plan:
    """Plan the rounds of a concurrency."""
    timed, warmup = split_prompts(prompts, config.num_prompts, count_warmups(config.num_warmups, concurrency))
    return make_plan(
        timed,
        warmup,
        max_tokens=config.max_tokens,
        concurrency=concurrency,
        control=concurrency,
        seed=config.seed,
        temperature=config.temperature,
        waves=config.waves,
    )


def measure_point(
    config: SweepConfig,
    gamma: int,
    concurrency: int,
    prompts: list[Prompt],
    arms: tuple[Arm, Arm],
    progress: Progress,
    *,
    adaptive: bool = False,
) -> MeasuredPoint:
    """Measure ab.py's figures for (plain, speculating) arms, the rounds, a step's cost and the drafter's share of it.

    `adaptive`: γ is the most of an engine that decides in every step; its steps differ, and have no share.

    Raises:
        MeasurementStoppedError: a figure was withheld.
    """
    plan = plan_point(config, concurrency, prompts)
    result, run = measure_plan(config, plan, arms, progress, drafting=not adaptive)
    rows_ms = None if adaptive else asyncio.run(measure_rows(arms[0], plan, concurrency * (gamma + 1)))
    return describe_point(config, gamma, concurrency, result, run, rows_ms)


def join_point(
    config: SweepConfig,
    gamma: int,
    plan: Plan,
    bracket: Bracket[SweepPass],
    candidate: ArmSpec,
    *,
    adaptive: bool = False,
) -> MeasuredPoint:
    """Join three passes to a point. Raises MeasurementStoppedError when a figure was withheld."""
    run = join_run(*(one.run for one in bracket))
    result = assemble_sound(config, plan, run, candidate.label, drafting=not adaptive)
    rows_ms = [ms for one in bracket if (ms := one.rows_ms.get(plan.concurrency * (gamma + 1))) is not None]
    mean_ms = sum(rows_ms) / len(rows_ms) if rows_ms else None
    return describe_point(config, gamma, plan.concurrency, result, run, mean_ms)


def describe_point(
    config: SweepConfig, gamma: int, concurrency: int, result: AbResult, run: Run, rows_ms: float | None
) -> MeasuredPoint:
    """Describe the figures of a point whose A/B withheld none. `rows_ms`: a plain step over as many rows.

    Raises:
        MeasurementStoppedError: an endpoint is not what it was given as.
    """
    if config.by_url:
        for name, drafted in ((BASELINE, None), (CANDIDATE, gamma)):
            if (counted := counter_delta(run.arms[name])) is not None:
                check_drafts(run.arms[name].label, counted, drafted, by_url=True)
    baseline, candidate = result.arms[BASELINE], result.arms[CANDIDATE]
    assert baseline.chunk_gap_ms is not None
    assert candidate.chunk_gap_ms is not None
    assert result.speedup.point is not None
    assert result.speedup.ci95 is not None
    step_ms = candidate.chunk_gap_ms.mean
    return MeasuredPoint(
        gamma=gamma,
        concurrency=concurrency,
        speedup=result.speedup.point,
        ci95=result.speedup.ci95,
        tau=result.acceptance.length or 1.0,  # an adaptive engine may never have drafted
        per_position=result.acceptance.per_position or [],
        step_cost=step_ms / baseline.chunk_gap_ms.mean,
        draft_share=None if rows_ms is None else max(0.0, 1 - rows_ms / step_ms),
        tok_per_s={name: result.arms[name].tok_per_s or 0.0 for name in ARMS},
        memory={name: result.arms[name].memory for name in ARMS},
        parity=result.parity.summarise(),
        divergences=result.parity.divergences,
        drift=result.drift,
        beyond_block=config.is_beyond(gamma),
        pairs=list(list_pairs(run).values()),
    )


def measure_plan(
    config: SweepConfig, plan: Plan, arms: tuple[Arm, Arm], progress: Progress, *, drafting: bool = True
) -> tuple[AbResult, Run]:
    """Run a plan on two arms that are up. Raises MeasurementStoppedError when a figure was withheld.

    `drafting`: a candidate that never drafts is such a reason.
    """
    run = Run({arm.name: ArmRun(arm.spec.label) for arm in arms})
    asyncio.run(measure(plan, arms, run, progress))
    return assemble_sound(config, plan, run, arms[1].spec.label, drafting=drafting), run


def assemble_sound(config: SweepConfig, plan: Plan, run: Run, label: str, *, drafting: bool = True) -> AbResult:
    """Assemble the A/B of a run; `label` is the candidate's, `drafting` as of `measure_plan`.

    Raises MeasurementStoppedError when a figure was withheld.
    """
    environment = Environment(date="", command="")  # the sweep's own result has it
    result = assemble(run, plan, environment, dtype=config.dtype, drafting=drafting, prompts_file=str(config.prompts))
    if result.refused:
        reasons = "; ".join(sorted({refusal.reason for refusal in result.refused}))
        raise MeasurementStoppedError(f"{label}: {reasons}")
    return result
