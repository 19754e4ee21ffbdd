"""From a body to what the engine is asked: prompts, canvases, references, a request for every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random, SystemRandom

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Evenly, Reference
from laguna_serve.plugins.diffusion.engine.requests import Request
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.bodies import Body, ChatBody, CompletionBody
from laguna_serve.plugins.diffusion.server.errors import ApiError
from laguna_serve.plugins.diffusion.server.loading import Served, make_schedule


@dataclass(frozen=True, slots=True)
class Defaults:
    """What requests get that do not choose. Seeds: those of requests that are drawn and have none come from it."""

    canvas_length: int
    block_length: int
    seeds: Random = field(default_factory=SystemRandom)


def read_prompts(body: CompletionBody, served: Served) -> list[list[int]]:
    """Read the prompts of a completion as ids.

    Raises:
        ApiError: there is none.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [served.texts.encode(prompt, special=body.add_special_tokens)]
    if not prompt:
        raise ApiError(400, "prompt: expected a text or ids, got an empty list", "prompt")
    prompts: list[list[int]] = []
    ids = [part for part in prompt if isinstance(part, int)]
    if ids:
        return [ids]
    for part in prompt:
        if isinstance(part, str):
            prompts.append(served.texts.encode(part, special=body.add_special_tokens))
        elif isinstance(part, list):
            prompts.append(part)
    return prompts


def read_chat(body: ChatBody, served: Served) -> list[int]:
    """Read a chat as ids, by the checkpoint's template.

    Raises:
        ApiError: it cannot be rendered.
    """
    try:
        return served.texts.render_chat(
            body.messages,
            prompt_for_answer=body.add_generation_prompt,
            kwargs=body.chat_template_kwargs or {},
        )
    except DiffusionError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from None


def make_requests(body: Body, prompts: Sequence[Sequence[int]], served: Served, defaults: Defaults) -> list[Request]:
    """Make a request for every choice: `n` for each prompt, with seeds that follow each other.

    Raises:
        ApiError: what is asked for does not go together, or does not fit the model.
    """
    limit = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    block = body.block_length or defaults.block_length
    seed = body.seed if body.seed is not None else defaults.seeds.getrandbits(32) if body.temperature else 0
    stop = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else served.stop)
    requests = []
    for prompt in prompts:
        room = (served.max_model_len - len(prompt)) // block * block
        length = choose_length(body.canvas_length, limit, block, min(defaults.canvas_length, room))
        reference = choose_reference(body, served.decoder.reference, length // block)
        if len(prompt) + length > served.max_model_len:
            most = f"at most {served.max_model_len} tokens of prompt and canvas"
            raise ApiError(
                400, f"max_tokens: expected {most}, got {len(prompt)} and {length}; shorten one", "max_tokens"
            )
        try:
            canvas = Canvas(tuple(prompt), length, block, served.mask_id)
        except DiffusionError as error:
            raise ApiError(400, str(error), str(error).partition(":")[0]) from None
        requests += [
            Request(canvas, replace(reference, seed=seed + number), stop, limit, body.listed)
            for number in range(body.n or 1)
        ]
    return requests


def choose_length(asked: int | None, limit: int | None, block: int, usual: int) -> int:
    """Choose the canvas: what is asked for, else the limit in whole blocks, else what is usual; one block at least.

    Raises:
        ApiError: the limit does not fit the canvas, or that is not of whole blocks.
    """
    if asked is None:
        return -(-max(1, limit or usual) // block) * block
    if asked % block:
        got = f"{asked} in blocks of {block}"
        raise ApiError(400, f"canvas_length: expected whole blocks, got {got}; round it up", "canvas_length")
    if limit is not None and limit > asked:
        got = f"max_tokens {limit} on a canvas of {asked}"
        raise ApiError(400, f"canvas_length: expected max_tokens or more, got {got}; raise it", "canvas_length")
    return asked


def choose_reference(body: Body, usual: Reference, blocks: int) -> Reference:
    """Choose the reference: the server's, but for what the request says.

    Raises:
        ApiError: the steps cannot be spread over the blocks.
    """
    reference = replace(usual, temperature=body.temperature or 0.0)
    if body.steps is not None:
        if body.steps % blocks:
            got = f"{body.steps} over {blocks} blocks"
            raise ApiError(400, f"steps: expected as many for every block, got {got}; take a multiple", "steps")
        return replace(reference, schedule=Evenly(body.steps // blocks))
    if body.tokens_per_step is None and body.threshold is None:
        return reference
    return replace(reference, schedule=make_schedule(body.tokens_per_step, None, body.threshold))
