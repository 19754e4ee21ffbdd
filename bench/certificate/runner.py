"""Carries a certificate out: makes the passes that are missing, one engine after the other, judges them, replays."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.certificate.identity import Identity
from laguna_serve.bench.certificate.locating import DEFAULT_ROWS, MAX_COPIES, choose_sequence, differs
from laguna_serve.bench.certificate.passes import (
    Answers,
    PassedArm,
    StreamedAnswer,
    claim_endpoint,
    refuse_cached,
    run_pass,
)
from laguna_serve.bench.certificate.rescoring import ask, attach, list_questions, summarise
from laguna_serve.bench.certificate.result import (
    Certificate,
    CertificateWorkload,
    CertifiedArm,
    LoadResult,
    ReplaySummary,
    StreamCheck,
)
from laguna_serve.bench.certificate.verdict import (
    AGAIN,
    ROW_MATCHED,
    Load,
    Rules,
    find_not_own_best,
    find_verdict,
    judge_load,
    judge_streams,
)
from laguna_serve.bench.harness.prompts import count_own_lengths
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.counters import scrape_counters, summarise_acceptance
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.client.sampling import RequestFields
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.engine.row_check import RowCheck, check_rows
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

REFERENCE = "reference"
ROW_CHECK = "row_check"
# Prompts that are also streamed without log-probabilities, as users send them.
STREAMED = 16
# Tokens per step up to which a control counts as accepting nothing: random drafts hit now and then.
MAX_ACCEPTED = 1.2


@dataclass(frozen=True, slots=True)
class Job:
    """What is certified. `missing` says of a control or path that cannot be had why (its name → the reason).

    `identity` is None for endpoints by URL.
    """

    specs: Mapping[str, ArmSpec]
    identity: Identity | None
    missing: Mapping[str, str]
    prompts: Sequence[Prompt]
    max_tokens: int
    concurrencies: Sequence[int]
    dtype: str
    seed: int
    out: Path
    # Rows at once, γ + 1; `locate` None: ask for the first operation where something differs.
    rows: int = DEFAULT_ROWS
    locate: bool | None = None
    # With `temperature`, tokens are drawn with `seed`.
    identical: bool = False
    temperature: float = 0.0

    @property
    def rules(self) -> Rules:
        """What is asked of the arms."""
        return Rules(self.identical, drawn=self.temperature > 0)

    @property
    def sampling(self) -> RequestFields:
        """What requests say besides."""
        return {"temperature": self.temperature, "seed": self.seed} if self.temperature else {}

    @property
    def passes(self) -> Path:
        """Where answers are kept."""
        return self.out / "passes"


def run_job(job: Job, environment: Environment, progress: Progress) -> Certificate:
    """Make the passes that are missing, judge them, and replay what differs.

    Raises:
        EngineError, EndpointError, OSError: a pass could not be made; what was answered is kept.
    """
    arms = {
        name: _run_arm(job, name, job.specs[name], progress)
        for name in (BASELINE, ROW_MATCHED, CANDIDATE)
        if name in job.specs
    }
    baseline = [_read(job, BASELINE, concurrency) for concurrency in job.concurrencies]
    missing = dict(job.missing)
    if ROW_MATCHED in arms and (reason := _find_unfit(job, arms[ROW_MATCHED].about.acceptance)) is not None:
        missing[ROW_MATCHED] = reason
    loads = []
    for concurrency, answers in zip(job.concurrencies, baseline, strict=True):
        controls = {AGAIN: _read(job, AGAIN, concurrency)}
        if ROW_MATCHED not in missing:
            controls[ROW_MATCHED] = _read(job, ROW_MATCHED, concurrency)
        loads.append(
            judge_load(
                Load(concurrency, answers, _read(job, CANDIDATE, concurrency), controls), job.dtype, job.seed, job.rules
            )
        )
    replay = _replay(job, loads, baseline, progress)
    located = _locate(job, loads, progress)
    streams, reasons = _judge_streams(job, loads, baseline, arms)
    verdict, reasons = find_verdict(loads, reasons)
    return Certificate(
        verdict=verdict,
        reasons=reasons,
        environment=environment,
        workload=CertificateWorkload(
            prompts=len(job.prompts),
            max_tokens=job.max_tokens,
            own_lengths=count_own_lengths(job.prompts, job.max_tokens),
            concurrency=list(job.concurrencies),
            dtype=job.dtype,
            temperature=job.temperature,
            identical=job.identical,
            seed=job.seed,
        ),
        arms={name: arm.about for name, arm in arms.items()},
        missing=missing
        | {name: found for name, found in ((REFERENCE, replay), (ROW_CHECK, located)) if isinstance(found, str)},
        streams=streams,
        replay=None if isinstance(replay, str) else replay,
        loads=loads,
        row_check=None if isinstance(located, str) else located,
    )


def _find_unfit(job: Job, acceptance: float | None) -> str | None:
    """Why the row-matched control is none: it must accept next to nothing, and emit its target's first choices."""
    if acceptance is None or acceptance > MAX_ACCEPTED:
        shown = "no draft" if acceptance is None else f"{acceptance:.2f} tokens per step"
        return f"it should verify drafts and accept none, and shows {shown}; left out"
    for concurrency in job.concurrencies:
        if wrong := find_not_own_best(_read(job, ROW_MATCHED, concurrency)):
            return f"{len(wrong)} of its tokens are not its target's first choice; left out"
    return None


def _run_arm(job: Job, name: str, spec: ArmSpec, progress: Progress) -> PassedArm:
    """Make an arm's passes, unless all are there."""
    done = job.passes / f"{name}.json"
    if done.exists():
        progress.say(f"{name}: all passes are there")
    else:
        with open_arm(spec, job.passes, progress.say) as arm:
            write_result(done, asyncio.run(_make_passes(job, arm, progress)))
    return read_result(done, PassedArm)


async def _make_passes(job: Job, arm: Arm, progress: Progress) -> PassedArm:
    async with open_session() as session:
        client = await arm.connect(session, job.max_tokens, job.sampling)
        root = None if arm.spec.url is None else await claim_endpoint(job.passes, arm, session)
        before = await scrape_counters(session, arm.base_url)
        for concurrency in job.concurrencies:
            for kind in (arm.name, AGAIN) if arm.name == BASELINE else (arm.name,):
                await _make_pass(job, client, arm, kind, concurrency, progress)
                if arm.spec.url is not None:
                    hits = (await scrape_counters(session, arm.base_url)).since(before).prefix_cache_hits
                    refuse_cached(arm.name, hits, _answers_path(job, kind, concurrency))
        acceptance = summarise_acceptance((await scrape_counters(session, arm.base_url)).since(before))
        streamed: list[Record] = []
        # After an interruption there may be no pass left to see drafts in: what is streamed shows them.
        if arm.name != ROW_MATCHED or acceptance is None:
            progress.say(f"{arm.name}: {min(STREAMED, len(job.prompts))} prompts streamed, as users send them")
            streamed = await client.run_round(job.prompts[:STREAMED], concurrency=job.concurrencies[0])
            if failed := next((record for record in streamed if record.error is not None), None):
                arm.check()
                raise EndpointError(f"{arm.name}: prompt {failed.prompt_id}: {failed.error}; {CONTINUES}")
            if acceptance is None:
                acceptance = summarise_acceptance((await scrape_counters(session, arm.base_url)).since(before))
    return PassedArm(
        about=CertifiedArm(
            label=arm.spec.label,
            command=arm.command,
            acceptance=None if acceptance is None else acceptance.length,
            root=root,
        ),
        streamed=[msgspec.convert(record, StreamedAnswer, from_attributes=True) for record in streamed],
    )


async def _make_pass(job: Job, client: Client, arm: Arm, kind: str, concurrency: int, progress: Progress) -> None:
    answers = Answers(_answers_path(job, kind, concurrency))
    prompts = list(job.prompts)
    if kind == AGAIN:
        random.Random(job.seed).shuffle(prompts)  # other prompts share a batch than did the first time
    missing = len(prompts) - len(answers.by_id)
    if missing:
        progress.say(f"{kind}: {missing} prompts, {concurrency} at once")
    progress.begin()
    try:
        await run_pass(client, prompts, concurrency, answers, lambda done: progress.step(kind, done, missing))
    except EndpointError as error:
        await arm.look_for_death()
        raise EndpointError(f"{arm.name}: {error}; {CONTINUES}") from error


def _replay(
    job: Job, loads: Sequence[LoadResult], baseline: Sequence[Mapping[str, Probe]], progress: Progress
) -> ReplaySummary | str:
    """Ask the third path about every divergence. Returns the summary, or why there is none."""
    prefixes = list(list_questions(loads, baseline))
    if not prefixes:
        return "nothing differs"
    if REFERENCE not in job.specs:
        return job.missing[REFERENCE]
    try:
        with open_arm(job.specs[REFERENCE], job.passes, progress.say) as arm:
            progress.say(f"replaying {len(prefixes)} prefixes")
            progress.begin()
            steps = asyncio.run(_ask(arm, prefixes, progress))
    except (EngineError, EndpointError) as error:
        progress.say(f"the replay failed, the certificate goes on without it: {error}")
        return str(error)
    attach(loads, baseline, steps)
    return summarise([d for load in loads for d in load.candidate.divergences])


def _locate(job: Job, loads: Sequence[LoadResult], progress: Progress) -> RowCheck | str | None:
    """Ask the baseline's own modules which operation differs first. Returns what they say, or why nothing was asked."""
    if job.locate is False or (job.locate is None and not differs(loads)):
        return None
    engine = job.specs[BASELINE].config
    if engine is None:
        return "the arms were given by URL"
    answers = _read(job, BASELINE, job.concurrencies[0]), _read(job, CANDIDATE, job.concurrencies[0])
    copies = min(max(job.concurrencies), MAX_COPIES)
    progress.say(f"looking for the first operation that differs between one row and {job.rows}")
    try:
        return check_rows(engine, choose_sequence(*answers, job.rows), job.rows, copies, job.passes / "row-check.log")
    except (EngineError, OSError) as error:
        progress.say(f"the first operation was not found, the certificate goes on without it: {error}")
        return str(error)


async def _ask(
    arm: Arm, prefixes: list[tuple[int, ...]], progress: Progress
) -> dict[tuple[int, ...], dict[int, float]]:
    async with open_session() as session:
        client = await arm.connect(session, 1)
        return await ask(client, prefixes, lambda done: progress.step(arm.name, done, len(prefixes)))


def _judge_streams(
    job: Job,
    loads: Sequence[LoadResult],
    baseline: Sequence[Mapping[str, Probe]],
    arms: Mapping[str, PassedArm],
) -> tuple[dict[str, StreamCheck], list[str]]:
    reasons: list[str] = []
    streams: dict[str, StreamCheck] = {}
    observed = {BASELINE: baseline[0], CANDIDATE: _read(job, CANDIDATE, job.concurrencies[0])}
    for name, answers in observed.items():
        streamed = [Record(**msgspec.to_builtins(answer)) for answer in arms[name].streamed]
        streams[name] = judge_streams(answers, streamed, loads[0].noise)
        if count := streams[name].beyond_noise:
            reasons.append(
                f"the {name} streams other tokens, beyond rounding, than it gives with log-probabilities on {count} of "
                f"{streams[name].prompts} prompts"
            )
    return streams, reasons


def _read(job: Job, kind: str, concurrency: int) -> dict[str, Probe]:
    answers = Answers(_answers_path(job, kind, concurrency)).by_id
    return {prompt.id: answers[prompt.id] for prompt in job.prompts}


def _answers_path(job: Job, kind: str, concurrency: int) -> Path:
    return job.passes / f"{kind}-c{concurrency}.jsonl"
