"""The load client: streamed greedy completions from one OpenAI-compatible vLLM endpoint.

Built on aiohttp, the library that vLLM's own `vllm bench serve` uses, so that the two can be compared. While a request
runs the client only stamps and keeps what arrives; decoding waits until the whole round has ended, because client and
engine may share the processors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp

from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.logprobs import Probe, decode_probe
from laguna_serve.serving.client.records import Prompt, RawStream, Record, decode_stream
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING

# A request that says nothing for this long is dead, not slow.
SILENCE_S = 600.0
# vLLM's HTTP server closes an idle connection after 5 s; reusing one about to be closed fails the request.
KEEPALIVE_S = 3.0


Decoded = TypeVar("Decoded")


def open_session() -> aiohttp.ClientSession:
    """A session without a connection limit (the caller limits what is in flight)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=SILENCE_S),
        read_bufsize=1 << 20,
    )


class Client:
    """Sends prompts to one endpoint. End-of-sequence ignored: every answer has exactly `max_tokens`.

    Greedy, unless `sampling` says otherwise (fields of the request, such as temperature and seed). What it does not say
    is vLLM's neutral value, never that of the model's generation_config.json: a `top_k` of the release's would be
    measured unseen.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        model_name: str,
        max_tokens: int,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self._session = session
        self._url = base_url.rstrip("/") + "/v1/completions"
        self._body: dict[str, Any] = {
            "model": model_name,
            "max_tokens": max_tokens,
            **PLAIN_SAMPLING,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **(sampling or {}),
        }

    async def run_round(self, prompts: Sequence[Prompt]) -> list[Record]:
        """Send the prompts at once, wait for all of them, decode. A failed request becomes a record with `error`."""
        streams = await asyncio.gather(*(self._stream(prompt) for prompt in prompts))
        return [decode_stream(raw) for raw in streams]

    async def run_closed_loop(self, prompts: Sequence[Prompt], concurrency: int) -> list[Record]:
        """Send all prompts in order, `concurrency` in flight, the next as soon as one ends: vLLM's benchmark's way."""
        slots = asyncio.Semaphore(concurrency)

        async def send(prompt: Prompt) -> RawStream:
            async with slots:
                return await self._stream(prompt)

        streams = await asyncio.gather(*(send(prompt) for prompt in prompts))
        return [decode_stream(raw) for raw in streams]

    async def _stream(self, prompt: Prompt) -> RawStream:
        body = {**self._body, "prompt": prompt.text, "stream": True, "stream_options": {"include_usage": True}}
        raw = RawStream(prompt.id, started_ns=time.perf_counter_ns())
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    raw.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                else:
                    async for chunk in response.content.iter_any():
                        raw.reads.append((time.perf_counter_ns(), chunk))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raw.error = f"{type(error).__name__}: {error}"
        raw.ended_ns = time.perf_counter_ns()
        return raw

    async def probe(self, prompt: str | Sequence[int], logprobs: int = 2) -> Probe:
        """Run one prompt (text or token ids), not streamed, with the best log-probabilities of every step.

        Raises:
            EndpointError: the request failed.
        """
        extra = {"logprobs": logprobs, "return_tokens_as_token_ids": True}
        return await self._ask({**self._body, "prompt": prompt, **extra}, decode_probe)

    async def score(self, prompt: str) -> list[float]:
        """The loss (nats) of every token of a prompt after its first.

        Raises:
            EndpointError: the request failed.
        """
        body = {**self._body, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}

        def decode(answer: dict[str, Any]) -> list[float]:
            steps = answer["choices"][0]["prompt_logprobs"][1:]
            return [-float(next(iter(step.values()))["logprob"]) for step in steps]

        return await self._ask(body, decode)

    async def sample(self, prompt: str, count: int) -> list[list[int]]:
        """The token ids of `count` completions of one prompt, in one request.

        Raises:
            EndpointError: the request failed.
        """
        answers = await self._ask(
            {**self._body, "prompt": prompt, "n": count}, lambda body: [c["token_ids"] for c in body["choices"]]
        )
        if any(len(answer) != self._body["max_tokens"] for answer in answers) or len(answers) != count:
            lengths = sorted({len(answer) for answer in answers})
            expected = f"expected {count} answers of {self._body['max_tokens']} token ids"
            raise EndpointError(f"request: {expected}, got {len(answers)} of {lengths}")
        return answers

    async def _ask(self, body: dict[str, Any], decode: Callable[[dict[str, Any]], Decoded]) -> Decoded:
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    raise EndpointError(f"request: HTTP {response.status}: {(await response.text())[:200]}")
                return decode(await response.json())
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"request: {type(error).__name__}: {error}") from error


async def find_model_name(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model that the endpoint serves.

    Raises:
        EndpointError: nothing answers there, or what answers is no OpenAI-compatible server.
    """
    url = base_url.rstrip("/") + "/v1/models"
    try:
        async with session.get(url) as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise EndpointError(
            f"{url}: expected a list of models, got {type(error).__name__}: {error}; is the engine up?"
        ) from error
