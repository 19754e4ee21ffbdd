"""Runs a plan on two arms and keeps everything that was measured, however the run ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from laguna_serve.bench.harness.arms import Arm, ArmSpec, open_arm
from laguna_serve.bench.harness.order import Order
from laguna_serve.bench.harness.schedule import ARMS, BASELINE, CANDIDATE, Plan, Round
from laguna_serve.bench.stats.parity import find_mismatch
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.counters import SETTLE_S, Counters, scrape_counters, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.engine.figures import EngineFigures
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.machine.memory import EngineMemory

# An endpoint that fails this many rounds in a row is taken for dead.
MAX_FAILED_ROUNDS = 3
# How long a dying engine may take to be seen dead after its connections broke.
DEATH_S = 3.0
# Prompts that agreed are run again too, beside those that did not, so that the noise is not read off one prompt.
NOISE_PROMPTS = 4


@dataclass(slots=True)
class ArmRun:
    """The records, counters and engine facts of one arm.

    `rounds` maps the round's index to its records; the counters frame exactly those rounds, unless `cut`: then a
    request that was broken off may be in the counters but not in the records. `forced`: what was counted over the same
    prompts when answers had to go on past their end; `figures`: what the engine says of itself.
    """

    label: str
    command: list[str] | None = None
    rounds: dict[int, list[Record]] = field(default_factory=dict)
    before: Counters | None = None
    after: Counters | None = None
    cut: bool = False
    forced: Counters | None = None
    control: list[Record] = field(default_factory=list)
    probes: dict[str, Probe] = field(default_factory=dict)
    memory: EngineMemory | None = None
    figures: EngineFigures | None = None

    @property
    def records(self) -> dict[str, Record]:
        """Timed records by prompt id."""
        return {record.prompt_id: record for records in self.rounds.values() for record in records}


@dataclass(slots=True)
class Run:
    """A whole run. `stopped` says why it ended early, `interrupted` that a person (or a signal) ended it.

    One engine at a time (not `interleaved`), `again` is the baseline's last pass, after the candidate's.
    """

    arms: dict[str, ArmRun]
    again: ArmRun | None = None
    interleaved: bool = True
    stopped: str | None = None
    interrupted: bool = False

    @property
    def mismatched(self) -> list[str]:
        """Prompt ids whose answers differ between the arms."""
        return list_mismatches(*(self.arms[name] for name in ARMS))

    def passes(self, name: str) -> list[ArmRun]:
        """All that an arm ran."""
        return [self.arms[name], *([self.again] if self.again is not None and name == BASELINE else [])]


class MeasurementStoppedError(CommandError, RuntimeError):
    """The run cannot go on; what was measured stays."""


def list_mismatches(baseline: ArmRun, candidate: ArmRun) -> list[str]:
    """Prompt ids whose answers differ."""
    others = candidate.records
    return [
        prompt_id
        for prompt_id, record in baseline.records.items()
        if (other := others.get(prompt_id)) is not None
        and record.error is None
        and other.error is None
        and find_mismatch(record, other) is not None
    ]


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
        drivers = {arm.name: await _connect(session, arm, plan, run.arms[arm.name]) for arm in arms}
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
        drivers = {arm.name: await _connect(session, arm, plan, into)}
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
    progress.say(f"measuring {len(plan.prompts)} prompts × {plan.max_tokens} tokens on {' and '.join(drivers)}")
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


class Driver:
    """One arm with an open session: sends rounds and files what comes back into its ArmRun."""

    def __init__(self, session: aiohttp.ClientSession, arm: Arm, client: Client, run: ArmRun) -> None:
        self._session, self._arm, self._client, self._run = session, arm, client, run
        self._tokens, self._seconds, self._failed_rounds = 0, 0.0, 0

    @property
    def tok_per_s(self) -> float:
        """Rate of the timed rounds so far."""
        return self._tokens / self._seconds if self._seconds else 0.0

    async def warm_up(self, rounds: Sequence[Round]) -> None:
        """Send the warm-up rounds; a failure here means that there is nothing to measure."""
        for prompts in rounds:
            for record in await self._client.run_round(prompts):
                if record.error is not None:
                    self._arm.check()
                    raise EndpointError(f"{self._arm.name}: the warm-up failed: {record.error}")

    async def open_frame(self) -> None:
        """Read the counters before the timed rounds."""
        self._run.before = await scrape_counters(self._session, self._arm.base_url)

    async def close_frame(self, cut: bool = False) -> None:
        """Read the memory, and the counters after the timed rounds. `cut`: the rounds were broken off."""
        self._run.cut = cut
        self._run.memory, self._run.figures = self._arm.read_memory(), self._arm.read_figures()
        if self._run.before is not None:
            tokens = sum(len(record.token_ids) for record in self._run.records.values())
            url, settle_s = self._arm.base_url, 0.0 if cut else SETTLE_S
            self._run.after = await settle_counters(self._session, url, self._run.before, tokens, settle_s)

    async def run_round(self, index: int, prompts: Round) -> None:
        """Run and file one timed round."""
        records = await self._client.run_round(prompts)
        self._run.rounds[index] = records
        self._tokens += sum(len(record.token_ids) for record in records)
        self._seconds += wall_s(records)
        errors = [record.error for record in records if record.error is not None]
        self._failed_rounds = self._failed_rounds + 1 if errors else 0
        if errors:
            await self._look_for_death()
        if self._failed_rounds >= MAX_FAILED_ROUNDS:
            name = self._arm.name
            raise MeasurementStoppedError(f"{name}: {MAX_FAILED_ROUNDS} rounds in a row failed, the last: {errors[-1]}")

    async def run_control(self, rounds: Sequence[Round]) -> None:
        """Run rounds again that were timed before."""
        for prompts in rounds:
            self._run.control += await self._client.run_round(prompts)

    async def run_forced(self, rounds: Sequence[Round]) -> None:
        """Count over the same rounds with end-of-sequence ignored.

        Not filed where nothing drafts, no answer had ended by itself, or one fails.
        """
        counted, answers = counter_delta(self._run), self._run.records.values()
        if counted is None or counted.drafts == 0 or all(answer.finish_reason != "stop" for answer in answers):
            return
        before = await scrape_counters(self._session, self._arm.base_url)
        tokens = 0
        for prompts in rounds:
            records = await self._client.run_round(prompts, {"ignore_eos": True})
            if any(record.error is not None for record in records):
                self._arm.check()
                return
            tokens += sum(len(record.token_ids) for record in records)
        after = await settle_counters(self._session, self._arm.base_url, before, tokens)
        self._run.forced = after.since(before)

    async def probe(self, prompts: Sequence[Prompt]) -> None:
        """Run prompts again with log-probabilities; one that fails is left out, and its mismatch stays unexamined."""
        for prompt in prompts:
            try:
                self._run.probes[prompt.id] = await self._client.probe(prompt)
            except EndpointError:
                self._arm.check()

    async def _look_for_death(self) -> None:
        for _ in range(int(DEATH_S / 0.1) if self._arm.engine is not None else 0):
            self._arm.check()
            await asyncio.sleep(0.1)


async def _connect(session: aiohttp.ClientSession, arm: Arm, plan: Plan, run: ArmRun) -> Driver:
    model_name = arm.model_name or await find_model_name(session, arm.base_url)
    run.command = arm.command
    ending = {"ignore_eos": not plan.stop_at_eos}
    return Driver(session, arm, Client(session, arm.base_url, model_name, plan.max_tokens, ending), run)


def counter_delta(arm: ArmRun) -> Counters | None:
    """What the arm's counters gained over the timed rounds; None when the run ended before they were read again."""
    return None if arm.before is None or arm.after is None else arm.after.since(arm.before)


def wall_s(records: Sequence[Record]) -> float:
    """Seconds from the first request sent to the last answer ended."""
    return (max(record.ended_ns for record in records) - min(record.started_ns for record in records)) / 1e9
