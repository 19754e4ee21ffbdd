"""Losses of token rows by one vLLM endpoint, or a gateway before it, through its prompt log-probabilities.

A row goes to /v1/completions as token ids with `prompt_logprobs: 0`, so that every token of the prompt comes with its
own log-probability, and one token, the fewest, is generated and thrown away. vLLM does not read its prefix cache for
such a request: rows that begin alike, or come again, are computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TypeVar

import aiohttp

from laguna_serve.evals.perplexity.rows import Row
from laguna_serve.evals.perplexity.scored import ScoredRows
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import find_root
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.logprobs import ABOVE_ZERO, LOGITS
from laguna_serve.serving.kit.results import JsonObject

# In place of −∞, which JSON does not have, vLLM answers this.
CLAMPED = -9999.0
QUOTED = 300
Decoded = TypeVar("Decoded")


class RefusedError(EndpointError):
    """The endpoint works, but takes no such request."""


class ScoringEndpoint:
    """One model of an endpoint. Made by `open_endpoint`.

    Attributes:
        model_name: as requests call it.
        root: where the endpoint says that it was loaded from; None if it does not.
        max_model_len: longest sequence in tokens.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str, headers: Mapping[str, str]) -> None:
        self._session = session
        self._url = find_root(base_url)
        self._headers = headers
        self.model_name = ""
        self.root: str | None = None
        self.max_model_len = 0

    async def choose_model(self, name: str | None) -> None:
        """Look up the model, by default the first one.

        Raises:
            EndpointError: no vLLM endpoint answers, or it has no such model.
        """
        models = await self._ask("GET", "/v1/models", None, lambda answer: {m["id"]: m for m in answer["data"]})
        if not models or (name is not None and name not in models):
            served = ", ".join(models) or "none"
            raise EndpointError(f"{self._url}: expected model {name or 'any'}, got {served}; choose by --model")
        self.model_name = name or next(iter(models))
        self.root = models[self.model_name].get("root")
        length = models[self.model_name].get("max_model_len")
        # A gateway with several models lists their names alone.
        self.max_model_len = int(length) if length else (await self._tokenize("a", special=False))[1]

    async def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Turn a text into token ids, by default with the special tokens that the tokenizer puts around a prompt.

        Raises:
            EndpointError: the request failed.
        """
        return (await self._tokenize(text, special))[0]

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Measure the loss (nats) of every token after the first.

        Raises:
            EndpointError: the request failed, or a token has no finite loss, or a negative one, as logits make it.
        """
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

        def decode(answer: JsonObject) -> list[float]:
            steps = answer["choices"][0]["prompt_logprobs"]
            return [-float(step[str(token)]["logprob"]) for token, step in zip(tokens[1:], steps[1:], strict=True)]

        losses = await self._ask("POST", "/v1/completions", body, decode)
        # Also true of NaN.
        wrong = next((index for index, loss in enumerate(losses, 1) if not loss < -CLAMPED), None)
        if wrong is not None:
            got = f"{losses[wrong - 1]:g} nats at token {wrong} of {len(tokens)} (id {tokens[wrong]})"
            raise EndpointError(f"{self._url}: expected finite losses, got {got}; is the model sound?")
        wrong = next((index for index, loss in enumerate(losses, 1) if loss < -ABOVE_ZERO), None)
        if wrong is not None:
            got = f"{losses[wrong - 1]:g} nats at token {wrong} of {len(tokens)} (id {tokens[wrong]})"
            raise EndpointError(f"{self._url}: expected losses of at least 0, got {got}; {LOGITS}")
        return losses

    async def _tokenize(self, text: str, special: bool) -> tuple[list[int], int]:
        body = {"prompt": text, "add_special_tokens": special}
        return await self._ask(
            "POST", "/tokenize", body, lambda a: ([int(i) for i in a["tokens"]], int(a["max_model_len"]))
        )

    async def _ask(
        self, method: str, path: str, body: JsonObject | None, decode: Callable[[JsonObject], Decoded]
    ) -> Decoded:
        url = self._url + path
        named = {"model": self.model_name} if self.model_name else {}
        payload = None if body is None else {**named, **body}
        try:
            async with self._session.request(method, url, json=payload, headers=self._headers) as response:
                if response.status != 200:
                    kind = RefusedError if response.status == HTTPStatus.BAD_REQUEST else EndpointError
                    text = (await response.text(errors="replace"))[:QUOTED]
                    raise kind(f"{url}: expected an answer, got HTTP {response.status}: {text}")
                return decode(await response.json())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointError(f"{url}: expected an answer, got {type(error).__name__}: {error}; is it up?") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            expected = "expected vLLM's answer"
            raise EndpointError(f"{url}: {expected}, got another one ({error!r}); is vLLM behind it?") from error


async def open_endpoint(
    session: aiohttp.ClientSession, base_url: str, model_name: str | None = None, api_key: str | None = None
) -> ScoringEndpoint:
    """Open the model of an endpoint; `base_url` with or without /v1 at its end.

    Raises:
        EndpointError: no vLLM endpoint answers, or it has no such model.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    endpoint = ScoringEndpoint(session, base_url, headers)
    await endpoint.choose_model(model_name)
    return endpoint


async def check_vocabulary(endpoint: ScoringEndpoint, rows: Sequence[Row], source: str) -> None:
    """Check the largest id by having the endpoint read it: it knows its vocabulary, and says so if that is beyond it.

    Raises:
        EndpointError: the id was refused; the message tells where it is.
    """
    row = max(rows, key=lambda row: max(row.tokens))
    largest = max(row.tokens)
    try:
        await endpoint.score([largest])
    except RefusedError as error:
        where = f"id {largest} in row {row.document}, token {row.tokens.index(largest)}"
        raise EndpointError(f"{source}: expected token ids that the endpoint takes, got {where}: {error}") from error


async def score_rows(
    endpoint: ScoringEndpoint,
    rows: Sequence[Row],
    scored: ScoredRows,
    concurrency: int,
    report: Callable[[int], None],
) -> None:
    """Score the rows that are not yet, in order, `concurrency` requests in flight, one row in each.

    `report` gets after each how many of those are through.

    Raises:
        EndpointError: a request failed; the others that are in flight are broken off.
    """
    waiting = [number for number in range(len(rows)) if number not in scored.nats]
    before = len(scored.nats)

    async def work(number: int) -> None:
        row = rows[number]
        losses = await endpoint.score(row.tokens)
        scored.add(number, row, math.fsum(losses[row.first - 1 :]))
        report(len(scored.nats) - before)

    await run_closed_loop(waiting, concurrency, work)
