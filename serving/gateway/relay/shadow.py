"""Shadow traffic: a copy of greedy requests goes to a second engine, and the two answers are compared.

The client never waits for it: the copy runs beside the request, a bounded number at once, and what is too much, or too
large, is left out and counted. Compared are token ids where the client asked for them, else the text; logs tell where
two answers part, never what they say.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry, Counter

from laguna_serve.serving.client.sse import DONE, list_payloads
from laguna_serve.serving.gateway.config.tables import Model, Shadow
from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.telemetry.copies import Copied, Copies, Dropped

MOST_AT_ONCE = 32
# Of a request, and of each of its two answers.
MOST_BYTES = 8 << 20
TIMEOUT_S = 600.0
LEFT_OUT = "left_out"
PATHS = frozenset(("/v1/completions", "/v1/chat/completions"))


Record = Callable[[Exchange, bytes], None]


class _Sampling(msgspec.Struct):
    temperature: float | None = None
    n: int | None = None


def register_outcomes(registry: CollectorRegistry) -> Counter:
    """Register the count of copies by model, shadow and outcome."""
    name, help_text = "laguna_gateway_shadow_requests", "Copies by outcome: equal, different, failed, left_out."
    return Counter(name, help_text, ("model", "shadow", "outcome"), registry=registry)


class Shadows:
    """Sends copies and compares, for every model of a gateway."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        registry: CollectorRegistry,
        copies: Copies,
        record: Record | None = None,
    ) -> None:
        """With `record` every request is shown to it as well."""
        self._session, self._record, self._copies = session, record, copies
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes = register_outcomes(registry)

    def accompany(self, model: Model, exchange: Exchange, body: bytes) -> None:
        """Send copies of a request to the model's shadows, where it is one that can be compared; have it recorded."""
        if self._record is not None:
            self._record(exchange, body)
        head = exchange.head
        if not model.shadows or head.method != "POST" or head.path not in PATHS or not _is_greedy(body):
            return
        for shadow in model.shadows:
            if len(self._tasks) >= MOST_AT_ONCE or len(body) > MOST_BYTES:
                self._outcomes.labels(model.name, shadow.name, LEFT_OUT).inc()
                continue
            answer = exchange.keep_answer(self._copies, MOST_BYTES)
            task = asyncio.create_task(self._compare(model.name, shadow, exchange, body, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Drop what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(
        self, model: str, shadow: Shadow, exchange: Exchange, body: bytes, answer: asyncio.Future[Copied]
    ) -> None:
        outcome, where, head = "failed", None, exchange.head
        request_id = head.request_id.decode()
        try:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            options = shadow.request_options()
            options["headers"] |= {"Content-Type": "application/json", "X-Request-Id": request_id}
            url = shadow.url + head.path
            async with self._session.post(url, data=body, timeout=timeout, **options) as response:
                theirs = await _read_whole(response.content) if response.status == 200 else None
            ours = None if isinstance(theirs, Dropped) else await answer
            is_others = exchange.fallback_from is not None  # whose tokens are nothing to compare with
            if is_others or isinstance(ours, Dropped) or isinstance(theirs, Dropped):
                outcome = LEFT_OUT
            elif ours is not None and theirs is not None:
                where = await asyncio.to_thread(_compare_bodies, ours, theirs)  # 30 ms per MB, while streams go on
                outcome = "equal" if where is None else "different"
        except (aiohttp.ClientError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass  # counted as failed; the client's own request is none of this one's business
        self._outcomes.labels(model, shadow.name, outcome).inc()
        if outcome == "different":
            line = {"shadow": shadow.name, "model": model, "request_id": request_id, "first_difference": where}
            print(json.dumps(line), file=sys.stderr, flush=True)


async def _read_whole(content: aiohttp.StreamReader) -> Copied:
    """Read a body that is not too large."""
    body = bytearray()
    async for piece in content.iter_any():
        body += piece
        if len(body) > MOST_BYTES:
            return Dropped.TOO_LARGE
    return bytes(body)


def read_answer(body: bytes) -> list[Any]:
    """Read an answer's token ids, or its characters, in order; of several choices one after the other.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: it is no completion, or an error.
    """
    tokens: dict[int, list[Any]] = {}
    texts: dict[int, list[Any]] = {}
    for payload in list_payloads(body):
        if payload == DONE:
            continue
        event = json.loads(payload)
        if "error" in event:
            raise ValueError("an error instead of an answer")
        for choice in event["choices"]:
            index = choice.get("index", 0)
            message = choice.get("delta") or choice.get("message") or {}
            texts.setdefault(index, []).extend(choice.get("text") or message.get("content") or "")
            tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
    found = tokens if any(tokens.values()) else texts
    return [item for index in sorted(found) for item in found[index]]


def find_difference(ours: list[Any], theirs: list[Any]) -> int | None:
    """Where two answers part, None where they do not."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _compare_bodies(ours: bytes, theirs: bytes) -> int | None:
    return find_difference(read_answer(ours), read_answer(theirs))


def _is_greedy(body: bytes) -> bool:
    try:
        sampling = msgspec.json.decode(body, type=_Sampling)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return sampling.temperature == 0 and (sampling.n or 1) == 1
