"""Runs a plan on two arms and keeps everything that was measured, however the run ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.harness.driver import Driver, connect
from laguna_serve.bench.harness.order import Order
from laguna_serve.bench.harness.prompts import count_own_lengths, describe_load
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, Run
from laguna_serve.bench.harness.schedule import Plan
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.progress import Progress

# Prompts that agreed are run again too, beside those that did not, so that the noise is not read off one prompt.
NOISE_PROMPTS = 4


def run_plan(plan: Plan, specs: Sequence[ArmSpec], out: Path, order: Order, progress: Progress) -> Run:
    """Run everything. Ctrl-C, or an engine that dies, ends the run early and keeps what was measured.

    Raises:
        EngineError, EndpointError, KeyboardInterrupt: the run ended before anything was measured.
    """
    run = Run({spec.name: ArmRun(spec.label) for spec in specs}, interleaved=not order.sequential)
    try:
        _run_arms(plan, dict(zip(ARMS, specs, strict=True)), out, run, order, progress)
    except KeyboardInterrupt:
        if not any(arm.rounds for arm in run.arms.values()):
            raise
        run.stopped, run.interrupted = "interrupted", True
        progress.say("interrupted: stopping, and reporting what was measured")
    except (EngineError, EndpointError, MeasurementStoppedError) as error:
        if not any(arm.rounds for arm in run.arms.values()):
            raise
        run.stopped = str(error)
        progress.say(f"stopped early: {error}")
    return run


def _run_arms(plan: Plan, specs: dict[str, ArmSpec], out: Path, run: Run, order: Order, progress: Progress) -> None:
    first, second = (run.arms[name] for name in ARMS)
    with open_arm(specs[BASELINE], out, progress.say) as baseline:
        if run.interleaved and order.allows(baseline, progress.say):
            with open_arm(specs[CANDIDATE], out, progress.say) as candidate:
                asyncio.run(measure(plan, [baseline, candidate], run, progress))
            return
        run.interleaved = False
        asyncio.run(measure_alone(plan, baseline, first, progress))
    with open_arm(specs[CANDIDATE], out, progress.say) as candidate:
        asyncio.run(measure_alone(plan, candidate, second, progress, lambda: run.mismatched))
    run.again = ArmRun(first.label)
    with open_arm(specs[BASELINE], out, progress.say) as baseline:
        asyncio.run(measure_alone(plan, baseline, run.again, progress, lambda: run.mismatched))
    join_passes(run, run.again)


def join_passes(run: Run, again: ArmRun) -> None:
    """File the baseline's last pass: it is the control of the first, and was asked about what differs."""
    run.again, run.interleaved = again, False
    run.arms[BASELINE].control = [*again.records.values()]
    run.arms[BASELINE].probes = again.probes


async def measure(plan: Plan, arms: Sequence[Arm], run: Run, progress: Progress) -> None:
    """Both arms are up: warm up, run every round on either, and examine what differs; all of it is filed in `run`."""
    async with open_session() as session:
        drivers = {arm.name: await connect(session, arm, plan, run.arms[arm.name]) for arm in arms}
        await _run_framed(plan, drivers, progress)
        if plan.control:
            progress.say(f"control: the baseline against itself on {sum(map(len, plan.control))} prompts")
            await drivers[BASELINE].run_control(plan.control)
        if plan.stop_at_eos:
            await _force(plan, drivers[CANDIDATE], progress)
        await _examine(plan, drivers, run.mismatched, progress)


async def measure_alone(
    plan: Plan, arm: Arm, into: ArmRun, progress: Progress, find_differing: Callable[[], list[str]] = list
) -> None:
    """One pass of one arm: warm up, run every round, and examine the prompts (ids) that then turn out to differ."""
    async with open_session() as session:
        drivers = {arm.name: await connect(session, arm, plan, into)}
        await _run_framed(plan, drivers, progress)
        if plan.stop_at_eos and arm.name == CANDIDATE:
            await _force(plan, drivers[CANDIDATE], progress)
        await _examine(plan, drivers, find_differing(), progress)


async def _force(plan: Plan, candidate: Driver, progress: Progress) -> None:
    progress.say(f"acceptance past the end: the candidate again on {len(plan.prompts)} prompts, end ignored")
    await candidate.run_forced(plan.rounds)


async def _run_framed(plan: Plan, drivers: dict[str, Driver], progress: Progress) -> None:
    progress.say(f"warming up with {sum(map(len, plan.warmup))} prompts")
    for driver in drivers.values():
        await driver.warm_up(plan.warmup)
    load = describe_load(len(plan.prompts), plan.max_tokens, count_own_lengths(plan.prompts, plan.max_tokens))
    progress.say(f"measuring {load} on {' and '.join(drivers)}")
    try:
        await _run_rounds(plan, drivers, progress)
    except BaseException:
        for driver in drivers.values():
            with suppress(EndpointError):  # it may be the reason why the run was cut
                await driver.close_frame(cut=True)
        raise
    for driver in drivers.values():
        await driver.close_frame()


async def _examine(plan: Plan, drivers: dict[str, Driver], mismatched: list[str], progress: Progress) -> None:
    if not mismatched:
        return
    progress.say(f"examining {len(mismatched)} prompts whose answers differ on {' and '.join(drivers)}")
    for driver in drivers.values():
        await driver.probe(_choose_probed(plan, mismatched))


def _choose_probed(plan: Plan, mismatched: list[str]) -> list[Prompt]:
    differing = set(mismatched)
    agreeing = [prompt for prompt in plan.prompts if prompt.id not in differing][:NOISE_PROMPTS]
    return [prompt for prompt in plan.prompts if prompt.id in differing] + agreeing


async def _run_rounds(plan: Plan, drivers: dict[str, Driver], progress: Progress) -> None:
    for driver in drivers.values():
        await driver.open_frame()
    progress.begin()
    done, total = 0, len(plan.prompts) * len(drivers)
    for index, (prompts, order) in enumerate(zip(plan.rounds, plan.orders, strict=True)):
        for name in order if len(drivers) > 1 else drivers:
            await drivers[name].run_round(index, prompts)
            done += len(prompts)
            progress.step(name, done, total, drivers[name].tok_per_s)
