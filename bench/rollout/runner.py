"""Runs what bench/rollouts.py measures: checks it, measures the points that the folder lacks, and reads them all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET, Struct, UnsetType, structs

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, Arm, ArmSpec, check_specs, open_arm
from laguna_serve.bench.harness.in_turn import Passes, measure_in_turn
from laguna_serve.bench.harness.order import Load, choose_order
from laguna_serve.bench.harness.prompts import PromptsError
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.bench.rollout.options import RolloutsConfig
from laguna_serve.bench.rollout.points import Driver, measure_point, plan_point
from laguna_serve.bench.rollout.result import MeasuredPoint, Turn, Work
from laguna_serve.bench.rollout.weights import check_start, give_version, open_versions
from laguna_serve.bench.stats.drift import Drift, find_drift
from laguna_serve.bench.stats.intervals import RoundPair
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import RunDirError, claim_folder, fingerprint, is_begun
from laguna_serve.serving.planning.inspection import inspect


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured. `batches`: the model itself at each; `versions`: name → folder, at `version_batch`."""

    work: Work
    specs: tuple[ArmSpec, ArmSpec]
    prompts: list[Prompt]
    gamma: int
    adaptive: bool
    batches: list[int]
    versions: dict[str, Path]
    version_batch: int
    folder: Path
    sequential: bool | None

    @property
    def fixed_gamma(self) -> int | None:
        """γ where it is not decided in every step."""
        return None if self.adaptive else self.gamma


class TurnsPass(Struct, frozen=True, kw_only=True):
    """All turns of one engine at a point."""

    turns: list[Turn]


def prepare(config: RolloutsConfig, environment: Environment) -> Job:
    """Check everything that can be checked before an engine starts, and claim the folder of finished points.

    Raises:
        PromptsError, CheckpointError: something does not fit.
        RunDirError: the folder holds another measurement.
        EngineError: an engine could not be started.
    """
    device = "url" if config.by_url else environment.device.kind if environment.device is not None else "cpu"
    work = Work(config.group, config.max_tokens, config.temperature, config.rounds, config.seed, device)
    gamma = config.candidate_url[0].gamma if config.by_url else inspect(config.make_engine(drafting=True)).gamma
    assert gamma is not None, "there is a draft"
    specs = config.make_specs(gamma)
    if not is_begun(config.points):
        check_specs(specs, config.max_tokens)
    versions = open_versions(None if config.by_url else config.model, [str(folder) for folder in config.versions])
    batches = sorted({*config.batches, *([config.versions_at] if versions else [])})
    prompts = config.load_prompts(lengths=False)
    needed, _ = work.split(max(batches))
    if needed * work.rounds > len(prompts):
        expected = f"expected {needed * work.rounds} of them, {work.rounds} rounds of {needed}, got {len(prompts)}"
        raise PromptsError(f"{config.prompts}: {expected}; add prompts, or lower --rounds or --batch")
    claim_points(config, environment, work, gamma, prompts)
    return Job(
        work=work,
        specs=specs,
        prompts=prompts,
        gamma=gamma,
        adaptive=config.adaptive,
        batches=batches,
        versions=versions,
        version_batch=config.versions_at,
        folder=config.points,
        sequential=config.sequential,
    )


def claim_points(
    config: RolloutsConfig, environment: Environment, work: Work, gamma: int, prompts: Sequence[Prompt]
) -> None:
    """Take the folder of finished points. Raises RunDirError when it holds those of another measurement."""
    names = ("model", "draft", "draft_sampling", "dtype", "eager", "kv_cache_gib", "max_num_seqs")
    settings = {name: getattr(config, name) for name in names} | {
        "no_prefix_caching": not config.prefix_caching,
        "gamma": gamma,
        "work": structs.asdict(work),
        "prompts": [prompt.text for prompt in prompts],
        "checkpoints": [fingerprint(config.model), fingerprint(config.draft)],
        "packages": environment.versions,
        "device": environment.device.name if environment.device is not None else None,
        **config.list_urls(),
        **({"adaptive": True} if config.adaptive else {}),
    }
    claim_folder(config.points, settings)


def measure_missing(job: Job, progress: Progress) -> None:
    """Measure the points that the folder lacks. Starts no engine when it lacks none.

    Raises:
        RunDirError: a version is not the one that was measured under its name.
        EngineError, EndpointError, MeasurementStoppedError: something could not be measured; finished points stay.
    """
    batches = [batch for batch in job.batches if read_point(job, batch, None) is None]
    versions = [name for name in job.versions if read_point(job, job.version_batch, name) is None]
    if not batches and not versions:
        return
    if len(batches) + len(versions) < len(job.batches) + len(job.versions):
        progress.say(f"continuing: {len(batches) + len(versions)} points are missing")
    load = Load.of(job.prompts, job.work.max_tokens, max(job.batches))
    order = choose_order(job.specs, job.sequential, load, progress.say)
    plain, speculating = (order.apply(spec) for spec in job.specs)
    if not order.sequential:
        with open_arm(plain, job.folder, progress.say) as baseline:
            if order.allows(baseline, progress.say):
                with open_arm(speculating, job.folder, progress.say) as candidate:
                    asyncio.run(_measure(job, (baseline, candidate), batches, versions, progress))
                return
    _measure_in_turn(job, batches, versions, progress)


def _measure_in_turn(job: Job, batches: Sequence[int], versions: Sequence[str], progress: Progress) -> None:
    """Every point on the plain engine, on the speculating one, and on the plain one again; passes are kept.

    Servers keep the last version that they were given: of them the model itself is measured to its end first.
    """
    first: list[tuple[int, str | None]] = [(batch, None) for batch in batches]
    later: list[tuple[int, str | None]] = [(job.version_batch, name) for name in versions]
    by_url = any(spec.config is None for spec in job.specs)
    for points in (first, later) if by_url else (first + later,):
        if points:
            _measure_points(job, points, progress)


def _measure_points(job: Job, points: Sequence[tuple[int, str | None]], progress: Progress) -> None:
    parts = {find_path(job, *point).stem: point for point in points}
    passes = Passes(job.folder / "passes", TurnsPass)

    def measure(arm: Arm, part: str) -> TurnsPass:
        return asyncio.run(_measure_pass(job, arm, *parts[part], progress))

    failed = measure_in_turn(job.specs, {part: [CANDIDATE] for part in parts}, passes, measure, progress)
    for part, (batch, version) in parts.items():
        if (bracket := passes.find_bracket(CANDIDATE, part)) is None:
            continue
        before, candidate, after = (kept.turns for kept in bracket)
        twice = list(zip(before, after, strict=True))
        rounds = [RoundPair(first.tokens, first.wall_s, last.tokens, last.wall_s) for first, last in twice]
        turns = {BASELINE: [first.join(last) for first, last in twice], CANDIDATE: candidate}
        write_result(find_path(job, batch, version), _make_point(job, batch, version, turns, find_drift(rounds, 0)))
    if failed:
        raise MeasurementStoppedError(failed[CANDIDATE])


async def _measure_pass(job: Job, arm: Arm, batch: int, version: str | None, progress: Progress) -> TurnsPass:
    async with open_session() as session:
        if version is None:
            await check_start(session, arm, job.versions)
        else:
            await give_version(session, arm, version, job.versions[version])
        driver = Driver(session, arm, job.work)
        turns = await measure_point(job.work, batch, job.prompts, {arm.name: driver}, progress, gamma=job.fixed_gamma)
        return TurnsPass(turns=turns[arm.name])


async def _measure(
    job: Job, arms: tuple[Arm, Arm], batches: list[int], versions: list[str], progress: Progress
) -> None:
    async with open_session() as session:
        drivers = {arm.name: Driver(session, arm, job.work) for arm in arms}
        for arm in arms if batches else ():
            await check_start(session, arm, job.versions)
        for batch in batches:
            await _measure_one(job, batch, None, drivers, progress)
        for name in versions:
            for arm in arms:
                await give_version(session, arm, name, job.versions[name])
            await _measure_one(job, job.version_batch, name, drivers, progress)


async def _measure_one(
    job: Job, batch: int, version: str | None, drivers: dict[str, Driver], progress: Progress
) -> None:
    plan = plan_point(job.work, batch, job.prompts)
    what = "" if version is None else f"version {version}, "
    progress.say(f"{what}batch {batch}: {len(plan.rounds)} rounds of {batch} × {job.work.max_tokens} tokens per arm")
    turns = await measure_point(job.work, batch, job.prompts, drivers, progress, gamma=job.fixed_gamma)
    write_result(find_path(job, batch, version), _make_point(job, batch, version, turns))


def _make_point(
    job: Job, batch: int, version: str | None, turns: dict[str, list[Turn]], drift: Drift | UnsetType = UNSET
) -> MeasuredPoint:
    requests, sequences = job.work.split(batch)
    return MeasuredPoint(
        version=version,
        fingerprint="" if version is None else fingerprint(str(job.versions[version])),
        batch=batch,
        requests=requests,
        sequences_per_request=sequences,
        turns=turns,
        drift=drift,
    )


def find_path(job: Job, batch: int, version: str | None) -> Path:
    """Find the file of a point. Of a version the batch is in its name too: another --version-batch is another point."""
    return job.folder / (f"batch{batch}.json" if version is None else f"batch{batch}-version-{version}.json")


def read_point(job: Job, batch: int, version: str | None) -> MeasuredPoint | None:
    """Read a finished point, or None. Raises RunDirError when it is of another version of that name."""
    path = find_path(job, batch, version)
    if not path.exists():
        return None
    point = read_result(path, MeasuredPoint)
    if version is not None and point.fingerprint != fingerprint(str(job.versions[version])):
        expected = f"the version {version} that {path} was measured with, got another"
        raise RunDirError(f"{job.versions[version]}: expected {expected}; rename it or remove the point")
    return point
