"""Rollouts: groups of sampled completions of one prompt, with what the engine said of every token.

They come through the gateway, which says with which version of the weights an answer was made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from laguna_serve.evals.codegen.syntax_reward import reward_syntax
from laguna_serve.serving.client.routed_experts import decode_experts
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.client.traffic import TrafficRecord
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.open_files import raise_limit

TIMEOUT_S = 600.0


class RolloutError(CommandError, RuntimeError):
    """The service did not give what was asked for; one line."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion: `logprobs` (nats) by the engine, one per token; `version` of the weights that made it.

    `experts` [prompt + tokens − 1, layers, top_k]: what the engine chose; None where it does not say.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    version: str
    experts: np.ndarray | None = field(default=None, compare=False)


async def sample_groups(
    base_url: str, model_name: str, prompts: Sequence[str], *, group: int, max_tokens: int, temperature: float = 1.0
) -> list[list[Rollout]]:
    """`group` completions of every prompt, from the whole vocabulary (temperature 0: the likeliest), all at once.

    Raises:
        RolloutError: a request failed, or an answer lacks a field.
    """
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    raise_limit()
    # Unlimited: aiohttp's own hundred would let the others wait, and count that as the engine's time.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(prompt: str) -> list[Rollout]:
            body = {
                "model": model_name,
                "prompt": prompt,
                "n": group,
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
            body |= {"logprobs": 0, "return_token_ids": True, **PLAIN_SAMPLING}
            try:
                async with session.post(f"{base_url}/v1/completions", json=body) as response:
                    if response.status != 200:
                        raise RolloutError(
                            f"rollouts: HTTP {response.status}: {(await response.text(errors='replace'))[:200]}"
                        )
                    version = response.headers.get("X-Weight-Version", "")
                    return [read_choice(prompt, choice, version) for choice in (await response.json())["choices"]]
            except (aiohttp.ClientError, TimeoutError, OSError, KeyError, TypeError, ValueError) as error:
                raise RolloutError(f"rollouts: {type(error).__name__}: {error}; see the engine's log") from error

        return list(await asyncio.gather(*map(ask, prompts)))


def read_choice(prompt: str, choice: JsonObject, version: str) -> Rollout:
    """One of an answer's choices, rewarded."""
    experts = choice.get("routed_experts")
    return Rollout(
        prompt_ids=tuple(choice["prompt_token_ids"]),
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(choice["logprobs"]["token_logprobs"]),
        reward=reward_syntax(prompt, choice["text"]),
        version=version,
        experts=None if experts is None else decode_experts(experts),
    )


def record_traffic(groups: Sequence[Sequence[Rollout]], temperature: float) -> list[TrafficRecord]:
    """Record rollouts as traffic."""
    return [
        TrafficRecord(
            prompt_token_ids=list(rollout.prompt_ids),
            token_ids=list(rollout.token_ids),
            temperature=temperature,
            weight_version=rollout.version,
        )
        for group in groups
        for rollout in group
    ]
