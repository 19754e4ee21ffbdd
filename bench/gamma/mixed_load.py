"""Does a schedule of γ by batch size beat the best single γ? Both under a load that changes all the time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec, open_arm
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.passes import make_measure, open_passes
from laguna_serve.bench.gamma.points import assemble_sound, choose_sweep_order, measure_plan
from laguna_serve.bench.gamma.result import MixedLoad, PointFigures
from laguna_serve.bench.harness.in_turn import join_run, measure_in_turn
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.bench.harness.schedule import Plan, Round, count_warmups, draw_orders, make_plan
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

Schedule = Sequence[tuple[int, int, int]]
# Rounds of every concurrency: enough pairs for an interval.
CYCLES = 12
MIXED = "mixed"


def find_best_single(points: Sequence[PointFigures]) -> int:
    """Find the γ, 0 for plain decoding, that needs the least time for a mixed load, by the measured rates.

    In that load every concurrency comes equally often with as many prompts.
    """
    concurrencies = sorted({point.concurrency for point in points})
    rates: dict[int, dict[int, float]] = {}
    for point in points:
        rates.setdefault(point.gamma, {})[point.concurrency] = point.tok_per_s[CANDIDATE]
        rates.setdefault(0, {})[point.concurrency] = point.tok_per_s[BASELINE]
    whole = {gamma: by for gamma, by in rates.items() if len(by) == len(concurrencies)}
    return min(whole, key=lambda gamma: sum(c / whole[gamma][c] for c in concurrencies))


def compare_schedule(
    config: SweepConfig, single: int, schedule: Schedule, prompts: list[Prompt], progress: Progress
) -> MixedLoad:
    """Compare a single γ (baseline) with the schedule (candidate) in an A/B, or say why there is none to make.

    Raises:
        EngineError, EndpointError, MeasurementStoppedError: it could not be made.
    """
    if len({gamma for _, _, gamma in schedule}) == 1:
        return MixedLoad(single=single, skipped="the schedule is a single γ", speedup=None)
    path = config.points / "mixed.json"
    if path.exists():
        stored = read_result(path, MixedLoad)
        if (stored.single, stored.schedule) == (single, list(schedule)):
            return stored
    specs = (
        ArmSpec(BASELINE, f"γ {single} throughout", config=config.make_engine(single or None)),
        ArmSpec(CANDIDATE, f"γ by batch size: {list(schedule)}", config=_make_scheduled(config, schedule)),
    )
    plan = make_mixed_plan(config, prompts)
    result = _measure_pair(config, specs, plan, prompts, progress)
    assert result.speedup.ci95 is not None, "a figure that is withheld raises"
    mixed = MixedLoad(
        single=single,
        schedule=list(schedule),
        skipped=None,
        rounds=len(plan.rounds),
        prompts=len(plan.prompts),
        speedup=result.speedup.point,
        ci95=result.speedup.ci95,
        parity=result.parity.summarise(),
        drift=result.drift,
    )
    write_result(path, mixed)
    return mixed


def _measure_pair(
    config: SweepConfig, specs: tuple[ArmSpec, ArmSpec], plan: Plan, prompts: list[Prompt], progress: Progress
) -> AbResult:
    progress.say(f"mixed load: rounds of {', '.join(map(str, config.concurrency))} prompts")
    order = choose_sweep_order(config, specs, prompts, progress)
    if not order.sequential:
        with open_arm(order.apply(specs[0]), config.points, progress.say) as baseline:
            if order.allows(baseline, progress.say):
                with open_arm(order.apply(specs[1]), config.points, progress.say) as candidate:
                    return measure_plan(config, plan, (baseline, candidate), progress)[0]
    identity = hashlib.sha256(repr([spec.label for spec in specs]).encode()).hexdigest()[:8]
    passes = open_passes(config.points / f"passes-mixed-{identity}")
    measure = make_measure(passes, {MIXED: plan}, progress)
    failed = measure_in_turn(specs, {MIXED: [CANDIDATE]}, passes, measure, progress)
    if (bracket := passes.find_bracket(CANDIDATE, MIXED)) is None:
        raise MeasurementStoppedError(failed[CANDIDATE])
    return assemble_sound(config, plan, join_run(*(one.run for one in bracket)), specs[1].label)


def make_mixed_plan(config: SweepConfig, prompts: list[Prompt]) -> Plan:
    """Interleaved rounds of every concurrency, CYCLES times or as long as there are prompts.

    Before them there is one round of each, and of each size half the rounds go first to either arm.
    """
    count = min(len(prompts), CYCLES * sum(config.concurrency))
    warmups = max(sum(config.concurrency), count_warmups(config.num_warmups, max(config.concurrency)))
    timed, warmup = split_prompts(prompts, count, warmups)
    plan = make_plan(
        timed,
        warmup,
        max_tokens=config.max_tokens,
        concurrency=1,
        control=0,
        seed=config.seed,
        temperature=config.temperature,
    )
    rounds = cut_in_turn(timed, config.concurrency)
    drawn = {
        size: iter(draw_orders(sum(len(one) == size for one in rounds), config.seed + size))
        for size in config.concurrency
    }
    return replace(
        plan,
        rounds=rounds,
        orders=tuple(next(drawn[len(one)]) for one in rounds),
        warmup=cut_in_turn(warmup, config.concurrency),
        concurrency=max(config.concurrency),
    )


def cut_in_turn(prompts: Sequence[Prompt], sizes: Sequence[int]) -> tuple[Round, ...]:
    """Cut prompts into rounds of the sizes in turn, as long as there are enough."""
    rounds: list[Round] = []
    left = prompts
    for size in cycle(sizes):
        if len(left) < size:
            break
        rounds.append(tuple(left[:size]))
        left = left[size:]
    return tuple(rounds)


def _make_scheduled(config: SweepConfig, schedule: Schedule) -> EngineConfig:
    most = max(gamma for _, _, gamma in schedule)
    return replace(config.make_engine(most), gamma_schedule=tuple(schedule))
