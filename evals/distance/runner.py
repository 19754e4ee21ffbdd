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
from laguna_serve.evals.distance.kept import Answer, KeptAnswers, KeptLosses, KeptPrompts, Loss, ReadPrompt
from laguna_serve.evals.distance.options import JUDGE
from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint, open_endpoint
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.progress import Progress


@dataclass(frozen=True, slots=True)
class Job:
    """What is compared.

    Attributes:
        specs: the references, the baseline first.
        canvas: what an answer takes of the context.
        context: the least that a reference's flags give it; None where none says.
        prompt_tokens: the most that a prompt may have; None for what fits.
        folder: keeps the prompts as they were read, and the judge's log.
        judge_key: names the judge's losses.
    """

    specs: Mapping[str, ArmSpec]
    judge: ArmSpec
    prompts: Sequence[Prompt]
    prompt_tokens: int | None
    max_tokens: int
    canvas: int
    context: int | None
    concurrency: int
    folder: Path
    judge_key: str

    def find_folder(self, name: str) -> Path:
        """Find where a reference's answers, the judge's losses on them, and its engine's log are kept."""
        return self.folder / "references" / name


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run has: prompts, the answers of every reference, and the judge's losses."""

    prompts: KeptPrompts
    answers: dict[str, KeptAnswers]
    losses: dict[str, KeptLosses]


def run(job: Job, progress: Progress) -> Kept:
    """Get the answers and losses that are missing.

    Raises:
        EngineError, EndpointError, OSError: an engine cannot be had, or died, or a request failed; what was answered is
            kept.
        JournalError: a file of what was kept cannot be read.
    """
    kept = Kept(
        KeptPrompts(job.folder / "prompts.jsonl", ReadPrompt, lambda prompt: prompt.id),
        {name: KeptAnswers(job.find_folder(name)) for name in job.specs},
        {
            name: KeptLosses(job.find_folder(name) / f"losses-{job.judge_key}.jsonl", Loss, lambda loss: loss.id)
            for name in job.specs
        },
    )
    for name, spec in job.specs.items():
        missing = [prompt.id for prompt in job.prompts if prompt.id not in kept.answers[name].by_key]
        unread = name == BASELINE and any(prompt.id not in kept.prompts.by_key for prompt in job.prompts)
        if missing or unread:
            with open_arm(spec, job.find_folder(name), progress.say) as arm:
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
                if cut := sum(kept.prompts.by_key[prompt.id].is_cut for prompt in job.prompts):
                    progress.say(f"{cut} of {len(job.prompts)} prompts are cut from the left")
            else:
                await check_tokenizer(arm.name, endpoint, job.prompts, kept.prompts)
                _check_room(job, arm.name, endpoint, kept.prompts)
            if not missing:
                return
            progress.say(f"asking the {arm.name} for {len(missing)} of {len(job.prompts)} answers")
            progress.begin()
            prompts = [kept.prompts.by_key[prompt] for prompt in missing]
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
            await arm.look_for_death()
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
            await arm.look_for_death()
            raise


async def _open(session: aiohttp.ClientSession, arm: Arm) -> ScoringEndpoint:
    return await open_endpoint(session, arm.base_url, arm.model_name)


def _find_most(job: Job, endpoint: ScoringEndpoint) -> int:
    """Find the most tokens that a prompt may have. Raises EndpointError where an answer leaves no room for one."""
    context = min(endpoint.max_model_len, job.context or endpoint.max_model_len)
    room = context - job.canvas
    if room < 1:
        expected = f"expected room for a canvas of {job.canvas} tokens and a prompt"
        raise EndpointError(f"--max-tokens: {expected}, got {context} tokens of context; lower it")
    return room if job.prompt_tokens is None else min(room, job.prompt_tokens)


def _check_room(job: Job, name: str, endpoint: ScoringEndpoint, kept: KeptPrompts) -> None:
    """Raise EndpointError where a reference's context is too short for what the baseline has read."""
    room = endpoint.max_model_len - job.canvas
    longest = max(len(kept.by_key[prompt.id].prompt_ids) for prompt in job.prompts)
    if longest > room:
        remedy = f"begin another --out with --prompt-tokens {room}" if room > 0 else "lower --max-tokens"
        raise EndpointError(f"{name}: expected room for prompts of {longest} tokens, got {max(room, 0)}; {remedy}")
