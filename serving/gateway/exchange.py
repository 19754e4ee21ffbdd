"""One request on its way: from its body to the last byte of its answer.

A state machine of callbacks. What an engine sends is written to the client in the call in which it arrives; a task
runs only while the request waits for a slot or a connection. It is sent again, to another engine, only while its
engine cannot be reached, so that none runs twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Protocol

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.access import Holder
from laguna_serve.serving.gateway.backlog import Backlog
from laguna_serve.serving.gateway.cors import Cors
from laguna_serve.serving.gateway.engine import Engine
from laguna_serve.serving.gateway.errors import GatewayError
from laguna_serve.serving.gateway.headers import DRAFT, REQUEST_ID, WEIGHTS, Head, Headers, pass_headers, render_request
from laguna_serve.serving.gateway.http1 import Connection, SilentError, StalledError, UnreachableError
from laguna_serve.serving.gateway.pool import Pool

OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s?(\d+)')
PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s?(\d+)')
# Before a request is sent to another engine: so that those of an engine that died do not arrive there all at once.
RETRY_PAUSE_S = 0.02
CLIENT_GONE = 499
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where an answer goes: the client's connection."""

    def start(self, status: int, headers: Headers) -> None:
        """The head; names in lower case."""

    def write(self, data: bytes) -> None:
        """A chunk of the body."""

    def flush(self) -> None:
        """Nothing more for now: what was said is to be sent."""

    def end(self) -> None:
        """The body is complete."""

    def cut(self) -> None:
        """Close the connection in the middle: the body is short of its length, and cannot be mended."""


class Exchange:
    """A request and its answer. `body`, then whatever the engine and the client do; `on_finish` is called once."""

    __slots__ = (
        "_affinity",
        "_arrived_s",
        "_body",
        "_connection",
        "_holder",
        "_limits",
        "_on_finish",
        "_paused",
        "_pool",
        "_recent",
        "_said",
        "_sink",
        "_streams",
        "_task",
        "answer",
        "backlog",
        "cause",
        "chunks",
        "client",
        "complete",
        "copy",
        "cors",
        "engine",
        "error",
        "finished",
        "first_s",
        "forwarded_for",
        "head",
        "held",
        "keys_are_ours",
        "last_s",
        "model",
        "refusal",
        "started_s",
        "status",
    )

    def __init__(self, head: Head, sink: Sink, holder: Holder | None, on_finish: Callable[[Exchange], None]) -> None:
        self.head, self._sink, self._holder, self._on_finish = head, sink, holder, on_finish
        self.started_s = self._arrived_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s = 0.0
        self.status = self.chunks = 0
        self.complete = self.finished = self._streams = self._paused = False
        self.copy: bytearray | None = None
        self.answer: asyncio.Future[bytes | None] | None = None
        self.engine: Engine | None = None
        self.model: str | None = None
        self.error: str | None = None
        self.refusal: GatewayError | None = None
        self.cause: str | None = None
        self.client, self.forwarded_for = head.peer, b""
        self.cors: Cors | None = None
        self.keys_are_ours = holder is not None
        self.backlog: Backlog | None = None
        self.held = 0
        self._pool: Pool | None = None
        self._body = b""
        self._affinity: bytes | None = None
        self._recent = (b"", b"")
        self._said: tuple[bytes, bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None

    @property
    def key(self) -> Holder | None:
        """Whose request it is."""
        return self._holder

    def keep_answer(self) -> asyncio.Future[bytes | None]:
        """What the client will have got: the body of a complete answer with status 200, or None."""
        if self.answer is None:
            self.copy, self.answer = bytearray(), asyncio.get_running_loop().create_future()
        return self.answer

    def send(self, pool: Pool, body: bytes, affinity: bytes | None) -> None:
        """To an engine of the pool; at once if one has a slot and a connection is open."""
        self._arrived_s = time.perf_counter()
        self._pool, self._body, self._affinity, self.model = pool, body, affinity, pool.model.name
        pool.note_request()
        try:
            self.engine = pool.take(affinity)
        except GatewayError as error:
            self.fail(error)
            return
        connection = self.engine.origin.take() if self.engine is not None else None
        if connection is not None:
            self._go(connection)
            return
        try:
            if self.backlog is not None:
                self.backlog.hold(self, len(body))
        except GatewayError as error:
            self.fail(error)
            return
        self._task = asyncio.get_running_loop().create_task(self._reach())

    def leave(self) -> None:
        """The client is gone: the engine's work is aborted, the slot freed."""
        if not self.finished:
            self.status = CLIENT_GONE
            self._finish()

    def fail(self, error: GatewayError) -> None:
        """Say it in the way that is still possible: a whole answer, a last event, or a connection that is cut."""
        if self.finished:
            return
        self.error, self.refusal = error.message, error
        if self.status == 0:
            self.reply(error.status, error.headers(), error.body(self.head.path))
            return
        if self._streams:
            # A half event is ended first, or the error would be a part of it.
            gap = b"" if self._at_boundary() else b"\n\n"
            self._sink.write(gap + error.event(self.head.path))
            self._sink.end()
        else:
            self._sink.cut()
        self._finish()

    def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """An answer of the gateway's own."""
        self.status = status
        found = [*headers, (REQUEST_ID, self.head.request_id)]
        if status != 204:
            found.append((b"content-length", b"%d" % len(body)))
        if self.cors is not None:
            found += self.cors.list_headers(self.head.named.get(b"origin"))
        if self._pool is not None:
            found += zip((WEIGHTS, DRAFT), self._pool.versions, strict=True)
        self._sink.start(status, found)
        if self.head.method != "HEAD":
            self._sink.write(body)
        self._sink.end()
        self._finish()

    def pause(self) -> None:
        """The client takes no more for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    async def _reach(self) -> None:
        """Wait for a slot and for a connection; go to the next engine where the first was never reached."""
        assert self._pool is not None
        pool, tried = self._pool, set[Engine]()
        deadline = pool.clock() + pool.limits.queue_timeout_s
        try:
            while True:
                if self.engine is None:
                    self.engine = await pool.acquire(self._affinity, frozenset(tried), deadline)
                engine = self.engine
                self._arrived_s = time.perf_counter()
                try:
                    connection = engine.origin.take() or await engine.origin.connect(pool.limits.connect_timeout_s)
                except UnreachableError as error:
                    pool.release(engine)
                    self.engine = None
                    self.cause = f"{engine.name}: {error}"
                    if error.shortage:
                        raise errors.out_of_descriptors() from None
                    if engine.returns and not error.silent:
                        engine.note_unreachable(str(error))
                        continue
                    engine.note_failure(str(error), pool.clock(), silent=error.silent)
                    tried.add(engine)
                    if len(tried) == len(pool.engines) or not pool.may_retry():
                        raise errors.engine_lost() from None
                    await asyncio.sleep(random.uniform(0, RETRY_PAUSE_S))
                    continue
                self._task = None
                self._go(connection)
                return
        except GatewayError as error:
            self._task = None
            self.fail(error)
        except Exception:
            logger.exception("request %s", self.head.request_id.decode())
            self._task = None
            self.fail(errors.failed())

    def _go(self, connection: Connection) -> None:
        assert self.engine is not None
        assert self._pool is not None
        self._connection = connection
        self._said = self.engine.versions
        origin = self.engine.origin
        keys_are_ours = self.keys_are_ours or origin.has_credential
        data = render_request(
            self.head, self._body, origin.lines, origin.prefix, self.forwarded_for, keys_are_ours=keys_are_ours
        )
        self._body = b""
        if self.held and self.backlog is not None:
            self.backlog.release(self)
        connection.request(data, self, self._pool.limits.silence_timeout_s, bodiless=self.head.method == "HEAD")
        if self._paused:
            connection.pause()
        self.engine.stats.added_request.add(time.perf_counter() - self._arrived_s)

    def on_head(self, status: int, headers: Headers) -> None:
        """Of the engine."""
        engine = self.engine
        assert engine is not None
        assert self._said is not None
        self.status = status
        weights, draft = engine.versions
        if self._said is not engine.versions:
            # It ran before and after an update of the weights.
            weights, draft = self._said[0] + b", " + weights, self._said[1] + b", " + draft
            self._said = engine.versions
        found = pass_headers(headers, self.head.request_id, engine.config.name.encode(), weights, draft)
        if self.cors is not None:
            found = self.cors.replace_headers(found, self.head.named.get(b"origin"))
        self._streams = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in found)
        self._sink.start(status, found)

    def on_data(self, data: bytes) -> None:
        """Of the engine."""
        engine = self.engine
        assert engine is not None
        assert self._connection is not None
        now = self._connection.received_s
        if self.first_s is None:
            self.first_s = now
            engine.stats.first.add(now - self.started_s)
        elif self._streams:
            engine.stats.gap.add(now - self.last_s)
        self.last_s = now
        self.chunks += 1
        if self._said is not engine.versions and self._streams and self._at_boundary():
            self._said = engine.versions
            self._sink.write(b": x-weight-version: %s, x-draft-version: %s\n\n" % engine.versions)
        if self.copy is not None:
            self.copy += data
        self._recent = (self._recent[1], data)
        self._sink.write(data)

    def on_pause(self) -> None:
        """Of the engine."""
        assert self.engine is not None
        assert self._connection is not None
        self._sink.flush()
        self.engine.stats.added_chunk.add(time.perf_counter() - self._connection.received_s)

    def on_end(self) -> None:
        """Of the engine."""
        assert self.engine is not None
        self.complete, self._connection = True, None
        self._sink.end()
        self.engine.note_success()
        self._count_tokens()
        self._finish()

    def on_error(self, error: OSError) -> None:
        """Of the engine, or a client that takes nothing."""
        assert self.engine is not None
        assert self._pool is not None
        self._connection = None
        if isinstance(error, StalledError):
            self.error = "the client took nothing for too long"
            self._sink.cut()
            self.leave()
            return
        self.engine.last_error = str(error)
        self.cause = f"{self.engine.name}: {error}"
        self.fail(errors.engine_silent() if isinstance(error, SilentError) else errors.engine_lost())

    def _at_boundary(self) -> bool:
        """Nothing was sent, or whole events."""
        tail = (self._recent[0][-1:] + self._recent[1])[-2:]
        return tail in (b"", b"\n\n")

    def _count_tokens(self) -> None:
        """From the usage that an answer tells near its end."""
        assert self.engine is not None
        end = b"".join(self._recent)
        if self.status != 200 or not (found := OUTPUT_TOKENS.findall(end)):
            return
        stats, tokens = self.engine.stats, int(found[-1])
        stats.tokens += tokens
        if prompt := PROMPT_TOKENS.findall(end):
            stats.prompt_tokens += int(prompt[-1])
        if self._streams and tokens > 1 and self.first_s is not None:
            stats.itl.add((self.last_s - self.first_s) / (tokens - 1))

    def _finish(self) -> None:
        self.finished = True
        self._body = b""
        if self.held and self.backlog is not None:
            self.backlog.release(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        if self.engine is not None and self._pool is not None:
            self._pool.release(self.engine)
        if self.answer is not None and self.copy is not None and not self.answer.done():
            self.answer.set_result(bytes(self.copy) if self.complete and self.status == 200 else None)
        self._on_finish(self)
        del self._sink  # else the two would keep each other until the garbage collector comes
