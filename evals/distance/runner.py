"""Gets what is missing: the references' answers, one engine after the other, and the judge's losses at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from laguna_serve.bench.arms.arms import BASELINE, Arm, ArmSpec, open_arm
from laguna_serve.evals.distance.asking import AnswerClient, ask_and_count, check_tokenizer, read_prompts
from laguna_serve.evals.distance.judging import find_room, judge_answers, list_unjudged
from laguna_serve.evals.distance.kept import Answer, KeptAnswers, KeptLosses, KeptPrompts
from laguna_serve.evals.distance.options import JUDGE
from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint, open_endpoint
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.progress import Progress

# A dying engine is seen dead a moment after its connections broke.
DEATH_S = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is compared.

    Attributes:
        specs: the references, the baseline first.
        canvas: what an answer takes of the context.
        prompt_tokens: the most that a prompt may have; None for what fits.
        folder: keeps the prompts as they were read, the answers and the engines' logs.
        losses: the file of this judge's.
    """

    specs: Mapping[str, ArmSpec]
    judge: ArmSpec
    prompts: Sequence[Prompt]
    prompt_tokens: int | None
    max_tokens: int
    canvas: int
    concurrency: int
    folder: Path
    losses: Path


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run has: prompts, the answers of every reference, and the judge's losses."""

    prompts: KeptPrompts
    answers: dict[str, KeptAnswers]
    losses: KeptLosses


def run(job: Job, progress: Progress) -> Kept:
    """Get the answers and losses that are missing.

    Raises:
        EngineError, EndpointError, OSError: an engine cannot be had, or died, or a request failed; what was answered is
            kept.
        JournalError: a file of what was kept cannot be read.
    """
    kept = Kept(
        KeptPrompts(job.folder / "prompts.jsonl"),
        {name: KeptAnswers(job.folder / name) for name in job.specs},
        KeptLosses(job.losses),
    )
    for name, spec in job.specs.items():
        missing = [prompt.id for prompt in job.prompts if prompt.id not in kept.answers[name].by_id]
        if missing:
            with open_arm(spec, job.folder / name, progress.say) as arm:
                asyncio.run(_collect(job, arm, missing, kept, progress))
    if unjudged := list_unjudged(kept.answers, [prompt.id for prompt in job.prompts], kept.losses):
        with open_arm(job.judge, job.folder, progress.say) as arm:
            asyncio.run(_judge(job, arm, unjudged, kept, progress))
    return kept


async def _collect(job: Job, arm: Arm, missing: Sequence[str], kept: Kept, progress: Progress) -> None:
    async with open_session() as session:
        try:
            endpoint = await _open(session, arm)
            client = AnswerClient(session, arm.base_url, endpoint.model_name, job.max_tokens, {"ignore_eos": False})
            if arm.name == BASELINE:
                await read_prompts(client, endpoint, job.prompts, _find_most(job, endpoint), kept.prompts)
                if cut := sum(kept.prompts.by_id[prompt.id].is_cut for prompt in job.prompts):
                    progress.say(f"{cut} of {len(job.prompts)} prompts are cut from the left")
            else:
                await check_tokenizer(arm.name, endpoint, job.prompts, kept.prompts)
            progress.say(f"asking the {arm.name} for {len(missing)} of {len(job.prompts)} answers")
            progress.begin()
            prompts = [kept.prompts.by_id[prompt] for prompt in missing]
            await ask_and_count(
                session,
                arm.base_url,
                client,
                prompts,
                job.concurrency,
                kept.answers[arm.name],
                lambda done: progress.step(arm.name, done, len(missing)),
            )
        except EndpointError:
            await _look_for_death(arm)
            raise


async def _judge(job: Job, arm: Arm, unjudged: Sequence[tuple[str, Answer]], kept: Kept, progress: Progress) -> None:
    async with open_session() as session:
        try:
            endpoint = await _open(session, arm)
            await check_tokenizer(JUDGE, endpoint, job.prompts, kept.prompts)
            room = find_room(endpoint, job.max_tokens)
            progress.say(f"{arm.spec.label} judges {len(unjudged)} answers")
            progress.begin()
            await judge_answers(
                endpoint,
                kept.prompts,
                unjudged,
                room,
                job.concurrency,
                kept.losses,
                lambda done: progress.step(arm.name, done, len(unjudged)),
            )
        except EndpointError:
            await _look_for_death(arm)
            raise


async def _open(session: aiohttp.ClientSession, arm: Arm) -> ScoringEndpoint:
    return await open_endpoint(session, arm.base_url, arm.model_name)


def _find_most(job: Job, endpoint: ScoringEndpoint) -> int:
    """Find the most tokens that a prompt may have. Raises EndpointError where an answer leaves no room for one."""
    room = endpoint.max_model_len - job.canvas
    if room < 1:
        expected = f"expected room for a canvas of {job.canvas} tokens and a prompt"
        raise EndpointError(f"--max-tokens: {expected}, got {endpoint.max_model_len} tokens of context; lower it")
    return room if job.prompt_tokens is None else min(room, job.prompt_tokens)


async def _look_for_death(arm: Arm) -> None:
    for _ in range(int(DEATH_S / 0.1) if arm.engine is not None else 0):
        arm.check()
        await asyncio.sleep(0.1)
