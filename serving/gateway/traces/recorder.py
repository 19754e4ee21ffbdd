"""Keeps traces beside the requests: what has ended is read and written by a thread of its own, or left out.

A client never waits for it. What is under way and what has not been written yet is bounded in bytes; beyond it answers
are left out and counted, and so are those without token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta
from prometheus_client import CollectorRegistry, Counter

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.telemetry.copies import Copied, Copies, Dropped
from laguna_serve.serving.gateway.traces.answers import AnswerError, read_answer
from laguna_serve.serving.gateway.traces.store import Trace, TraceFile

PATHS = frozenset(("/v1/completions", "/v1/chat/completions"))
# Of one answer, and of all that wait to be written.
MOST_BYTES = MOST_WAITING_BYTES = 64 << 20
# How often what has come together is written.
EVERY_S = 0.5
logger = logging.getLogger(__name__)


class _Asked(msgspec.Struct):
    temperature: float | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    return_token_ids: bool | None = None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A request that has ended, as far as its trace goes."""

    body: bytes
    asked: _Asked
    trace: Trace


class TraceRecorder:
    """What is recorded of a gateway's requests. Without a file nothing is."""

    def __init__(self, file: TraceFile | None, registry: CollectorRegistry, copies: Copies | None = None) -> None:
        self._file, self._waiting, self._bytes = file, list[_Ended](), 0
        self._copies = Copies() if copies is None else copies
        self._failing = False
        name = "laguna_gateway_traces"
        help_text = "Answers by outcome: kept, busy, too_large, no_tokens, failed, dropped."
        self._outcomes = Counter(name, help_text, ("outcome",), registry=registry)

    def accompany(self, exchange: Exchange, body: bytes) -> None:
        """Record the answer of a request that asks for token ids, once it has ended."""
        if self._file is None or exchange.head.path not in PATHS:
            return
        try:
            asked = msgspec.json.decode(body, type=_Asked)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if not asked.return_token_ids:
            self._outcomes.labels("no_tokens").inc()
            return
        most = MOST_BYTES if self._file.max_bytes is None else min(MOST_BYTES, self._file.max_bytes)
        answer = exchange.keep_answer(self._copies, most)
        answer.add_done_callback(lambda answer: self._take(exchange, asked, answer))

    async def keep_writing(self, stopped: asyncio.Event) -> None:
        """Write what comes together, until it is stopped; then the rest, and close the file."""
        if self._file is None:
            return
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await stopped.wait()
            await self.write()
        self._file.close()

    async def write(self) -> None:
        """Write what has ended, in a thread. A failure is logged once; what could not be written is left out."""
        ended, self._waiting, self._bytes = self._waiting, [], 0
        if self._file is None or not ended:
            return
        try:
            kept, useless, dropped = await asyncio.to_thread(_write, self._file, ended)
        except Exception as error:  # whatever it is, later answers are recorded all the same
            if not self._failing:
                logger.error("traces: expected to write the file, got %s; answers are left out until it works", error)
            self._failing = True
            self._outcomes.labels("failed").inc(len(ended))
            return
        if self._failing:
            logger.info("traces: written again")
        self._failing = False
        for outcome, count in (("kept", kept), ("no_tokens", useless), ("dropped", dropped)):
            self._outcomes.labels(outcome).inc(count)

    def _take(self, exchange: Exchange, asked: _Asked, answer: asyncio.Future[Copied]) -> None:
        body = None if answer.cancelled() else answer.result()
        if body is None or exchange.engine is None:
            return
        if isinstance(body, Dropped):
            self._outcomes.labels(body.value).inc()
            return
        if self._bytes + len(body) > MOST_WAITING_BYTES:
            self._outcomes.labels("busy").inc()
            return
        self._bytes += len(body)
        self._waiting.append(_Ended(body, asked, _describe(exchange, asked)))


def _describe(exchange: Exchange, asked: _Asked) -> Trace:
    """Describe a request but for its tokens."""
    assert exchange.engine is not None
    weights, drafts = ([v.decode() for v in versions] for versions in zip(*exchange.said, strict=True))
    first_s = None if exchange.first_s is None else exchange.first_s - exchange.started_s
    return Trace(
        time=time.time(),
        request_id=exchange.head.request_id.decode("latin-1"),
        choice=0,
        key=None if exchange.key is None else exchange.key.name,
        model=exchange.model or "",
        engine=exchange.engine.name,
        weight_versions=tuple(dict.fromkeys(weights)),
        draft_versions=tuple(dict.fromkeys(drafts)),
        temperature=asked.temperature if asked.temperature is not None else exchange.engine.config.default_temperature,
        seed=asked.seed,
        finish_reason=None,
        first_token_s=first_s,
        total_s=exchange.last_s - exchange.started_s,
        prompt_token_ids=[],
        token_ids=[],
        logprobs=None,
        routed_experts=None,
        speculation=None,
    )


def _write(file: TraceFile, ended: list[_Ended]) -> tuple[int, int, int]:
    """Read the answers and add them to the file; how many were kept, were useless, and had to go for them."""
    traces: list[Trace] = []
    useless = 0
    for one in ended:
        try:
            answer = read_answer(one.body)
        except AnswerError:
            useless += 1
            continue
        speculation = None if answer.speculation is None else msgspec.json.encode(answer.speculation).decode()
        traces += (
            msgspec.structs.replace(
                one.trace,
                choice=number,
                prompt_token_ids=choice.prompt_token_ids,
                token_ids=choice.token_ids,
                logprobs=choice.logprobs or None,
                finish_reason=choice.finish_reason,
                routed_experts=choice.routed_experts,
                speculation=speculation,
            )
            for number, choice in enumerate(answer.choices)
        )
    return len(traces), useless, file.add(traces) if traces else 0
