"""Has the judge read every answer after its prompt: the loss of the answer's tokens alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from laguna_serve.evals.distance.kept import Answer, KeptAnswers, KeptLosses, KeptPrompts, Loss, ReadPrompt
from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.errors import EndpointError


def list_unjudged(
    answers: Mapping[str, KeptAnswers], prompts: Sequence[str], losses: Mapping[str, KeptLosses]
) -> list[tuple[str, Answer]]:
    """List the answers without a loss, prompt by prompt, each with its reference; an empty one has none to get."""
    return [
        (name, kept.by_key[prompt])
        for prompt in prompts
        for name, kept in answers.items()
        if kept.by_key[prompt].token_ids and prompt not in losses[name].by_key
    ]


def find_room(endpoint: ScoringEndpoint, max_tokens: int) -> int:
    """Find how many tokens of a prompt the judge can read before an answer of the greatest length.

    Raises:
        EndpointError: none.
    """
    room = endpoint.max_model_len - 1 - max_tokens  # one token is always generated
    if room < 1:
        expected = f"expected room for an answer of {max_tokens} tokens and its prompt"
        raise EndpointError(f"judge: {expected}, got {endpoint.max_model_len}; lower --max-tokens or take another")
    return room


def count_shortened(prompts: Sequence[ReadPrompt], losses: Mapping[str, KeptLosses]) -> int:
    """Count the prompts of which the judge read the end alone."""
    read = {prompt: loss.context for kept in losses.values() for prompt, loss in kept.by_key.items()}
    return sum(read.get(prompt.id, len(prompt.prompt_ids)) < len(prompt.prompt_ids) for prompt in prompts)


async def judge_answers(
    endpoint: ScoringEndpoint,
    prompts: KeptPrompts,
    unjudged: Sequence[tuple[str, Answer]],
    room: int,
    concurrency: int,
    kept: Mapping[str, KeptLosses],
    report: Callable[[int], None],
) -> None:
    """Measure the losses of these answers, each after the last `room` tokens of its prompt.

    Raises:
        EndpointError: a request failed; the others that are in flight are broken off.
    """
    done = 0

    async def work(item: tuple[str, Answer]) -> None:
        nonlocal done
        name, answer = item
        context = prompts.by_key[answer.id].prompt_ids[-room:]
        losses = await endpoint.score([*context, *answer.token_ids])
        nats = math.fsum(losses[len(context) - 1 :])
        kept[name].add(Loss(answer.id, nats, len(answer.token_ids), len(context)))
        done += 1
        report(done)

    await run_closed_loop(unjudged, concurrency, work)
