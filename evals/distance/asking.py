"""Asks one reference for its answers: the prompts as token ids, the same for all, greedy, an answer ends by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import aiohttp

from laguna_serve.evals.distance.kept import Answer, KeptAnswers, KeptPrompts, ReadPrompt, Stretch
from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.counters import scrape_counters, scrape_denoising_steps, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.results import JsonObject


class AnswerClient(Client):
    """Asks for whole answers without log-probabilities, which cost time and are not needed here."""

    async def read(self, prompt: Prompt, endpoint: ScoringEndpoint) -> list[int]:
        """Read a prompt as the engine does, or a conversation by its chat template. Raises EndpointError."""
        ids = await (endpoint.tokenize(prompt.text) if prompt.chat is None else self._render(prompt))
        assert not isinstance(ids, str)
        return ids

    async def answer(self, prompt: ReadPrompt) -> Answer:
        """Answer one prompt.

        Raises:
            EndpointError: the request failed.
        """

        def decode(answer: JsonObject) -> Answer:
            choice = answer["choices"][0]
            ended = choice.get("finish_reason") != "length"
            return Answer(prompt.id, tuple(choice["token_ids"]), choice.get("text") or "", ended)

        try:
            return await self._ask(self._url, {**self._body, "prompt": list(prompt.prompt_ids)}, decode)
        except EndpointError as error:
            raise EndpointError(f"prompt {prompt.id}: {error}") from error


async def read_prompts(
    client: AnswerClient, endpoint: ScoringEndpoint, prompts: Sequence[Prompt], most: int, kept: KeptPrompts
) -> None:
    """Read the prompts that were not yet, and cut each from the left to `most` tokens.

    Raises:
        EndpointError: a request failed.
    """
    for prompt in prompts:
        if prompt.id not in kept.by_key:
            ids = await client.read(prompt, endpoint)
            plain = await endpoint.tokenize(prompt.text, special=False)
            kept.add(ReadPrompt(prompt.id, tuple(ids[-most:]), tuple(plain), len(ids) > most))


async def check_tokenizer(name: str, endpoint: ScoringEndpoint, prompts: Sequence[Prompt], kept: KeptPrompts) -> None:
    """Check that an endpoint reads every prompt's text as the tokens that the baseline's engine read.

    Raises:
        EndpointError: it reads other ones, or a request failed.
    """
    for prompt in prompts:
        if tuple(await endpoint.tokenize(prompt.text, special=False)) != kept.by_key[prompt.id].plain_ids:
            got = f"one that reads prompt {prompt.id} as other tokens"
            raise EndpointError(f"{name}: expected the baseline's tokenizer, got {got}; choose another {name}")


async def ask(
    client: AnswerClient,
    prompts: Sequence[ReadPrompt],
    concurrency: int,
    answers: KeptAnswers,
    report: Callable[[int], None],
) -> tuple[int, int, float]:
    """Send the prompts in order, `concurrency` in flight. Returns answers, their tokens, and seconds.

    Raises:
        EndpointError: a request failed; the others that are in flight are broken off.
    """
    done = tokens = 0
    started = time.perf_counter()

    async def work(prompt: ReadPrompt) -> None:
        nonlocal done, tokens
        answer = await client.answer(prompt)
        answers.add(answer)
        done, tokens = done + 1, tokens + len(answer.token_ids)
        report(done)

    await run_closed_loop(prompts, concurrency, work)
    return done, tokens, time.perf_counter() - started


async def ask_and_count(
    session: aiohttp.ClientSession,
    base_url: str,
    client: AnswerClient,
    prompts: Sequence[ReadPrompt],
    concurrency: int,
    answers: KeptAnswers,
    report: Callable[[int], None],
) -> None:
    """Do as `ask`, and file what the stretch took, with the engine's steps where it counts them.

    Raises:
        EndpointError: a request failed.
    """
    steps_before = await _read_steps(session, base_url)
    before = None if steps_before is None else await scrape_counters(session, base_url)
    done, tokens, seconds = await ask(client, prompts, concurrency, answers, report)
    steps = None
    if before is not None and steps_before is not None:
        await settle_counters(session, base_url, before, tokens)
        now = await _read_steps(session, base_url)
        steps = None if now is None else now - steps_before
    answers.add_stretch(Stretch(done, tokens, steps, seconds))


async def _read_steps(session: aiohttp.ClientSession, base_url: str) -> int | None:
    """Read the engine's steps so far; None where it counts none, or shows none, as a gateway in front of it may not."""
    try:
        return await scrape_denoising_steps(session, base_url)
    except EndpointError:
        return None
