"""Asks a vLLM endpoint's chat route for one greedy answer with token ids and log-probabilities.

serving/client/completions.py does so of the completions route: the two give the same kind of Probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.logprobs import Probe, read_logprob
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.results import JsonObject


class ChatClient(Client):
    """Sends every prompt as a user's message, through the server's chat template."""

    ROUTE: ClassVar = "/v1/chat/completions"

    async def probe(self, prompt: Prompt | str | Sequence[int], logprobs: int = 2) -> Probe:
        """Probe a chat's answer as the client of raw completions does.

        Raises:
            EndpointError: the request failed.
        """
        extra = {"logprobs": True, "top_logprobs": logprobs, "return_tokens_as_token_ids": True}
        messages = [{"role": "user", "content": prompt.text if isinstance(prompt, Prompt) else prompt}]
        return await self._ask(self._url, {**self._body, "messages": messages, **extra}, decode_chat)


def decode_chat(answer: JsonObject) -> Probe:
    """Read a chat answer, as parity.decode_probe reads a completion's.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of another kind, or a log-probability is not finite.
    """
    choice = answer["choices"][0]
    top = tuple(
        {
            int(item["token"].removeprefix("token_id:")): read_logprob(item["logprob"])
            for item in [*step["top_logprobs"], step]
        }
        for step in choice["logprobs"]["content"]
    )
    text, prompt_ids = choice["message"]["content"] or "", tuple(answer.get("prompt_token_ids") or ())
    return Probe(tuple(choice["token_ids"]), top, text=text, prompt_ids=prompt_ids)
