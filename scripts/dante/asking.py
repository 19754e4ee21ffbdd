"""What a teacher says to a prompt: a greedy answer with its log-probabilities, and sampled ones beside it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from laguna_serve.scripts.training.dante.records import CacheRecord, Prompt
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.errors import EndpointError, RefusedError
from laguna_serve.serving.client.openai_endpoint import VERSION_HEADERS, Answer, Endpoint, Form
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING, RequestFields
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress

KEY_VARIABLE = "OPENAI_API_KEY"
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
MARKED = re.compile(r"####[ \t]*(.+)")
SAID = re.compile(r"(?:answer is|answer:)[ \t]*(.+)", re.IGNORECASE)


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A journal's line: one prompt, the greedy answer and what is known of it, and the sampled ones' texts."""

    prompt: Prompt
    text: str
    finish_reason: str
    entropy: float
    tail_mass: float
    top_k: int
    samples: tuple[str, ...]
    teacher: str
    weight_version: str | None


@dataclass(frozen=True, slots=True)
class Manner:
    """How it is asked. `plain`: with the OpenAI API's own fields alone."""

    max_tokens: int
    samples: int
    temperature: float
    top: int
    seed: int
    plain: bool


def measure_entropy(top: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Measure an answer: mean entropy in nats, and mean mass of the tail.

    Args:
        top: of each token, log-probabilities of the likeliest ones; all others count as one outcome, and merging
            outcomes never raises an entropy.
    """
    entropies, tails = [], []
    for step in top:
        known = [value for value in step if value > -math.inf]
        tail = max(0.0, 1 - sum(map(math.exp, known)))
        entropy = -sum(math.exp(value) * value for value in known) - (tail * math.log(tail) if tail else 0.0)
        entropies.append(max(0.0, entropy))
        tails.append(tail)
    return sum(entropies) / len(entropies), sum(tails) / len(tails)


def find_outcome(text: str) -> str:
    r"""Find what an answer comes to: the last \boxed{…}, "#### …" or "answer is …", else its first line with a word."""
    for pattern in (BOXED, MARKED, SAID):
        if found := pattern.findall(text):
            return str(found[-1]).strip().rstrip(".")
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def measure_consistency(greedy: str, samples: Sequence[str]) -> float:
    """Measure the share of samples that come to what the greedy answer comes to; 1 without samples."""
    outcome = find_outcome(greedy)
    return sum(find_outcome(sample) == outcome for sample in samples) / len(samples) if samples else 1.0


def score_records(said: Sequence[Said]) -> list[CacheRecord]:
    """Make records of answers, in their order; difficulty is relative to these answers."""
    entropies = np.array([answer.entropy for answer in said])
    order = entropies.argsort(kind="stable")
    ranks = np.empty(len(said))
    ranks[order] = np.arange(len(said)) / max(1, len(said) - 1)
    records = []
    for answer, rank in zip(said, ranks.tolist(), strict=True):
        consistency = measure_consistency(answer.text, answer.samples)
        records.append(
            CacheRecord(
                prompt=answer.prompt,
                teacher_text=answer.text,
                output_entropy=round(answer.entropy, 6),
                self_consistency=consistency,
                difficulty_score=round((rank + 1 - consistency) / 2, 6),
                finish_reason=answer.finish_reason,
                teacher=answer.teacher,
                weight_version=answer.weight_version,
                top_k=answer.top_k,
                tail_mass=round(answer.tail_mass, 6),
            )
        )
    return records


async def ask_teacher(
    prompts: Sequence[Prompt],
    manner: Manner,
    journal: Journal[Said],
    base_url: str,
    model: str | None,
    concurrency: int,
    progress: Progress,
) -> None:
    """Ask for what the journal lacks; a prompt's answers go into it together, none of a prompt that is refused.

    Raises:
        EndpointError: the endpoint does not answer, refuses every prompt, gives no log-probabilities, or serves another
            teacher than before.
    """
    have = {msgspec.json.encode(answer.prompt) for answer in journal.entries}
    missing = [prompt for prompt in prompts if msgspec.json.encode(prompt) not in have]
    if not missing:
        return
    progress.begin()
    done = 0
    refused: list[RefusedError] = []
    async with Endpoint(base_url, model=model, api_key=os.environ.get(KEY_VARIABLE), retries=4) as endpoint:
        others = {answer.teacher for answer in journal.entries} - {endpoint.model}
        if others:
            expected = f"{min(others)}, whose answers were begun with"
            raise EndpointError(f"{base_url}: expected {expected}, got {endpoint.model}; choose another --out")

        async def work(prompt: Prompt) -> None:
            nonlocal done
            try:
                journal.append(await _ask(endpoint, prompt, manner))
            except RefusedError as error:
                refused.append(error)
            except EndpointError as error:
                begins = msgspec.json.encode(prompt)[:60].decode(errors="replace")
                raise EndpointError(f"{error}; what came so far is kept; what was asked begins {begins}") from None
            done += 1
            progress.step("asked", done, len(missing))

        await run_closed_loop(missing, concurrency, work)
    if refused and not journal.entries:
        raise refused[0]
    if refused:
        progress.say(f"{len(refused)} of {len(missing)} prompts were refused, and are left out: {refused[0]}")


async def _ask(endpoint: Endpoint, prompt: Prompt, manner: Manner) -> Said:
    form: Form = "completion" if isinstance(prompt, str) else "chat"
    fields: RequestFields = {} if manner.plain else PLAIN_SAMPLING.copy()
    fields["max_tokens"] = manner.max_tokens

    def ask(number: int) -> asyncio.Task[Answer]:
        how: RequestFields = {**fields, "temperature": manner.temperature if number else 0.0}
        how["seed"] = _derive(manner.seed, prompt, number)
        return asyncio.create_task(endpoint.ask(prompt, form, how, None if number else manner.top))

    tasks = [ask(number) for number in range(manner.samples + 1)]
    try:
        greedy, *samples = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    if greedy.text and greedy.top is None:
        remedy = "ask one that takes logprobs, as vLLM does; --top-logprobs is at most its --max-logprobs"
        raise EndpointError(f"{endpoint.base_url}: expected log-probabilities in answers, got none; {remedy}")
    entropy, tail = measure_entropy(greedy.top) if greedy.top else (0.0, 0.0)
    return Said(
        prompt=prompt,
        text=greedy.text,
        finish_reason=greedy.finish_reason or "stop",
        entropy=entropy,
        tail_mass=tail,
        top_k=min(map(len, greedy.top)) if greedy.top else 0,
        samples=tuple(sample.text for sample in samples),
        teacher=endpoint.model,
        weight_version=greedy.versions.get(VERSION_HEADERS[0]),
    )


def _derive(seed: int, prompt: Prompt, number: int) -> int:
    text = f"{seed}/{number}/".encode() + msgspec.json.encode(prompt)
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) >> 1
