"""The load client: streamed greedy completions from one OpenAI-compatible vLLM endpoint.

Built on aiohttp, the library that vLLM's own `vllm bench serve` uses, so that the two can be compared. While a request
runs the client only stamps and keeps what arrives; decoding waits until the whole round has ended, because client and
engine may share the processors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import aiohttp

from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.errors import EndpointError, find_broken_end
from laguna_serve.serving.client.logprobs import Probe, decode_probe, read_logprob
from laguna_serve.serving.client.records import Prompt, RawStream, Record, decode_stream
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING, RequestFields
from laguna_serve.serving.client.sse import is_comment
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.open_files import raise_limit

# A request that says nothing for this long is dead, not slow.
SILENCE_S = 600.0
# vLLM's HTTP server closes an idle connection after 5 s; reusing one about to be closed fails the request.
KEEPALIVE_S = 3.0
NONE: RequestFields = {}
Decoded = TypeVar("Decoded")


def find_root(url: str) -> str:
    """Find where a server's paths begin: without the slash at the end, and the /v1 that OpenAI's clients want."""
    return url.rstrip("/").removesuffix("/v1")


def open_session() -> aiohttp.ClientSession:
    """Open a session without a connection limit (the caller limits what is in flight)."""
    raise_limit()  # every request has a connection of its own
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=SILENCE_S),
        read_bufsize=1 << 20,
    )


class Client:
    """Sends prompts to one endpoint. End-of-sequence ignored: every answer has exactly `max_tokens`, or its prompt's.

    Greedy, unless `sampling` says otherwise (fields of the request, such as temperature, seed and ignore_eos). What it
    does not say is vLLM's neutral value, never that of the model's generation_config.json: a `top_k` of the release's
    would be measured unseen.
    """

    ROUTE: ClassVar = "/v1/completions"

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        model_name: str,
        max_tokens: int,
        sampling: RequestFields | None = None,
    ) -> None:
        self._session = session
        self._url = find_root(base_url) + self.ROUTE
        self._renderer = find_root(base_url) + "/tokenize"
        self._rendered: dict[str, list[int]] = {}
        self._heard = 0
        self._body: JsonObject = {
            "model": model_name,
            "max_tokens": max_tokens,
            **PLAIN_SAMPLING,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **(sampling or {}),
        }

    async def run_round(
        self, prompts: Sequence[Prompt], fields: RequestFields = NONE, concurrency: int | None = None
    ) -> list[Record]:
        """Send the prompts, wait for all of them, decode. A failed request becomes a record with `error`.

        `fields`: what these requests say besides or instead. `concurrency`: how many are under way, in order, the next
        sent as soon as one ends, as vLLM's own benchmark does; None: all are sent at once.
        """
        inputs = [await self._render(prompt) for prompt in prompts]
        streams: dict[int, RawStream] = {}

        async def send(number: int) -> None:
            streams[number] = await self._stream(prompts[number], inputs[number], fields)

        at_once = min(concurrency or len(prompts), len(prompts)) or 1
        await run_closed_loop(range(len(prompts)), at_once, send, heard=lambda: self._heard)
        return [decode_stream(streams[number]) for number in range(len(prompts))]

    async def _stream(self, prompt: Prompt, text: str | list[int], fields: RequestFields) -> RawStream:
        body = {**self._body, "prompt": text, "stream": True, "stream_options": {"include_usage": True}, **fields}
        body |= self._shorten(prompt)
        raw = RawStream(prompt.id, started_ns=time.perf_counter_ns())
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    raw.error = f"HTTP {response.status}: {(await response.text(errors='replace'))[:200]}"
                else:
                    heard_ns = raw.started_ns
                    async for chunk in response.content.iter_any():
                        now_ns = time.perf_counter_ns()
                        raw.reads.append((now_ns, chunk))
                        if not is_comment(chunk):
                            heard_ns = now_ns
                            self._heard += 1
                        elif now_ns - heard_ns > SILENCE_S * 1e9:
                            raise TimeoutError(f"nothing but comments for {SILENCE_S:.0f} s")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raw.error = f"{type(error).__name__}: {error}"
        raw.ended_ns = time.perf_counter_ns()
        return raw

    async def probe(self, prompt: Prompt | str | Sequence[int], logprobs: int = 2) -> Probe:
        """Run one prompt (or a text, or token ids), not streamed, with the best log-probabilities of every step.

        Raises:
            EndpointError: the request failed.
        """
        extra = {"logprobs": logprobs, "return_tokens_as_token_ids": True}
        if not isinstance(prompt, Prompt):
            return await self._ask(self._url, {**self._body, "prompt": prompt, **extra}, decode_probe)
        body = {**self._body, "prompt": await self._render(prompt), **extra, **self._shorten(prompt)}
        return await self._ask(self._url, body, decode_probe)

    async def score(self, prompt: Prompt) -> list[float]:
        """Measure the loss (nats) of every token of a prompt after its first.

        Raises:
            EndpointError: the request failed.
        """
        text = await self._render(prompt)
        body = {**self._body, "prompt": text, "max_tokens": 1, "prompt_logprobs": 0}

        def decode(answer: JsonObject) -> list[float]:
            steps = answer["choices"][0]["prompt_logprobs"][1:]
            return [-read_logprob(next(iter(step.values()))["logprob"]) for step in steps]

        return await self._ask(self._url, body, decode)

    async def score_top(self, token_ids: Sequence[int], count: int) -> list[dict[int, float]]:
        """Read the `count` likeliest tokens in the place of every token after the first: id → log-probability (nats).

        Raises:
            EndpointError: the request failed; vLLM gives no more than its --max-logprobs.
        """
        body = {**self._body, "prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": count}

        def decode(answer: JsonObject) -> list[dict[int, float]]:
            steps = answer["choices"][0]["prompt_logprobs"][1:]
            # The prompt's own token comes, too, whatever its rank.
            return [
                {int(i): read_logprob(t["logprob"]) for i, t in step.items() if t["rank"] <= count} for step in steps
            ]

        return await self._ask(self._url, body, decode)

    async def sample(self, prompt: Prompt, count: int) -> list[list[int]]:
        """Sample `count` completions of one prompt, in one request; return their token ids.

        Raises:
            EndpointError: the request failed.
        """
        body = {**self._body, "prompt": await self._render(prompt), "n": count}
        answers = await self._ask(self._url, body, lambda answer: [c["token_ids"] for c in answer["choices"]])
        if any(len(answer) != self._body["max_tokens"] for answer in answers) or len(answers) != count:
            lengths = sorted({len(answer) for answer in answers})
            expected = f"expected {count} answers of {self._body['max_tokens']} token ids"
            raise EndpointError(f"request: {expected}, got {len(answers)} of {lengths}")
        return answers

    def _shorten(self, prompt: Prompt) -> JsonObject:
        """Make the field of a prompt whose answer is to be shorter than the others'; none for others."""
        if prompt.max_tokens is None:
            return {}
        return {"max_tokens": min(prompt.max_tokens, self._body["max_tokens"])}

    async def _render(self, prompt: Prompt) -> str | list[int]:
        """Render what is sent.

        That is the text, or the token ids that the engine's chat template makes of a conversation (once).

        Raises:
            EndpointError: the template refused it, or the endpoint has no /tokenize.
        """
        if prompt.chat is None:
            return prompt.text
        if prompt.id not in self._rendered:
            body = {"model": self._body["model"], **prompt.chat}
            try:
                ids = await self._ask(self._renderer, body, lambda answer: [int(token) for token in answer["tokens"]])
            except EndpointError as error:
                raise EndpointError(f"prompt {prompt.id}, as token ids of the chat template: {error}") from error
            self._rendered[prompt.id] = ids
        return self._rendered[prompt.id]

    async def _ask(self, url: str, body: JsonObject, decode: Callable[[JsonObject], Decoded]) -> Decoded:
        try:
            async with self._session.post(url, json=body) as response:
                if response.status != 200:
                    raise EndpointError(
                        f"request: HTTP {response.status}: {(await response.text(errors='replace'))[:200]}"
                    )
                answer = await response.json()
                for choice in answer.get("choices") or ():
                    if (broken := find_broken_end(choice.get("finish_reason"))) is not None:
                        raise EndpointError(f"request: {broken}")
                return decode(answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointError(f"request: {type(error).__name__}: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise EndpointError(f"request: expected vLLM's answer, got {type(error).__name__}: {error}") from error


async def find_model_name(session: aiohttp.ClientSession, base_url: str) -> str:
    """Find the first model that the endpoint serves; raises as `list_models`."""
    return (await list_models(session, base_url))[0]


async def list_models(session: aiohttp.ClientSession, base_url: str) -> list[str]:
    """List the names under which the endpoint serves; one at least. Raises as `list_checkpoints`."""
    return list(await list_checkpoints(session, base_url))


async def list_checkpoints(session: aiohttp.ClientSession, base_url: str) -> dict[str, str | None]:
    """List the models that the endpoint serves, one at least, and where it says that each was loaded from.

    Raises:
        EndpointError: nothing answers there, or what answers is no OpenAI-compatible server.
    """
    url = find_root(base_url) + "/v1/models"
    try:
        async with session.get(url) as response:
            response.raise_for_status()
            served = {str(item["id"]): item.get("root") or None for item in (await response.json())["data"]}
            if not served:
                raise ValueError("an empty one")
            return served
    except (aiohttp.ClientError, TimeoutError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        remedy = "is the engine up?"
        if isinstance(error, aiohttp.ClientResponseError):
            remedy = "name the engine's own address: no key is sent"
        raise EndpointError(
            f"{url}: expected a list of models, got {type(error).__name__}: {error}; {remedy}"
        ) from error
