"""One request on its way: from its body to the last byte of its answer.

A state machine of callbacks. What an engine sends is written to the client in the call in which it arrives; a task
runs only while the request waits for a slot or a connection. It is sent again, to another engine, only while its
engine cannot be reached, so that none runs twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from laguna_serve.serving.gateway.access.demand import is_free
from laguna_serve.serving.gateway.access.edits import CHOICES_END, USAGE, drop_usage
from laguna_serve.serving.gateway.access.heads import list_headers
from laguna_serve.serving.gateway.access.holder import Claim, Holder
from laguna_serve.serving.gateway.counts.backlog import Backlog
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.reach import reach, take_kept
from laguna_serve.serving.gateway.engines.weight_policy import WeightPolicy, read_policy
from laguna_serve.serving.gateway.relay.sink import Sink
from laguna_serve.serving.gateway.relay.waiting import Waiter
from laguna_serve.serving.gateway.residence.place import Place
from laguna_serve.serving.gateway.telemetry.copies import Copied, Copies, Copy
from laguna_serve.serving.gateway.telemetry.stages import Trace
from laguna_serve.serving.gateway.telemetry.usage import count_tokens, keep_usage
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire import headers as heads
from laguna_serve.serving.gateway.wire.cors import Cors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.failures import SilentError, StaleError, StalledError
from laguna_serve.serving.gateway.wire.headers import DRAFT, UPSTREAM, WEIGHTS, Head, Headers
from laguna_serve.serving.gateway.wire.http1 import Connection
from laguna_serve.serving.gateway.wire.sse import EventStream, frame_events

CLIENT_GONE = 499


@dataclass(slots=True, eq=False)
class Exchange(Waiter):
    """A request and its answer; `on_finish` is called once. `key` is whose request it is, `client` where it is from.

    `claim` is what it holds of its key, `place` what of a model whose engine the gateway owns. `usage` are the tokens
    that the engine has told; with `drops_usage` it was asked for them in the client's place. `recover` takes a failure
    before the answer's head, if it can; the answer is then of another model than `fallback_from`. Times (`_s`) are
    `time.perf_counter`'s; `sent_s`: when the engine got it. `said`: versions of weights and drafter, in turn.
    """

    head: Head
    sink: Sink
    _on_finish: Callable[[Exchange], None]
    key: Holder | None = None
    claim: Claim | None = None
    usage: tuple[int, int] | None = None
    drops_usage: bool = False
    priority: int = 0
    policy: WeightPolicy | None = None
    recover: Callable[[GatewayError], bool] | None = None
    fallback_from: str | None = None
    trace: Trace | None = None
    place: Place | None = None
    keys_are_ours: bool = False
    client: str = ""
    forwarded_for: bytes = b""
    cors: Cors | None = None
    backlog: Backlog | None = None
    held: int = 0
    model: str | None = None
    engine: Engine | None = None
    affinity: bytes | None = None
    status: int = 0
    chunks: int = 0
    complete: bool = False
    finished: bool = False
    error: str | None = None
    refusal: GatewayError | None = None
    cause: str | None = None
    started_s: float = field(default_factory=time.perf_counter)
    dispatched_s: float = 0.0
    arrived_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    sent_s: float | None = None
    copy: Copy | None = None
    _pool: Pool | None = None
    _body: bytes = b""
    _task: asyncio.Task[None] | None = None
    _connection: Connection | None = None
    _paused: bool = False
    said: list[tuple[bytes, bytes]] = field(default_factory=list)
    streams: bool = False
    _events: EventStream | None = None
    recent: tuple[bytes, bytes] = (b"", b"")

    def keep_answer(self, copies: Copies, most: int) -> asyncio.Future[Copied]:
        """Keep what the client will have got, up to so many bytes: the body of a complete answer with status 200."""
        if self.copy is None:
            self.copy = Copy(copies)
        return self.copy.keep(most)

    def send(self, pool: Pool, body: bytes, affinity: bytes | None) -> None:
        """To an engine of the pool; at once if one has a slot and a connection is open."""
        self.arrived_s = time.perf_counter()
        self._pool, self._body, self.affinity, self.model = pool, body, affinity, pool.model.name
        pool.note_request()
        try:
            self.policy = read_policy(self.head.named)
            self.engine = pool.take(affinity, policy=self.policy)
            connection = take_kept(self.engine, len(body)) if self.engine is not None else None
            if connection is None and self.backlog is not None:
                self.backlog.hold(self, len(body))
        except GatewayError as error:
            self.fail(error)
            return
        if connection is not None:
            self._go(connection)
            return
        self.wait_for(reach(self, pool, len(body)), self._go)

    def let_go(self) -> None:
        """Let go of a model and its engine: for the end, or to be sent to another one."""
        self._body = b""
        if self.held and self.backlog is not None:
            self.backlog.release(self)
        if self.engine is not None and self._pool is not None:
            self._pool.release(self.engine)
        if self.place is not None:
            self.place.leave()
            self.place = None

    def leave(self) -> None:
        """Note that the client is gone: the engine's work is aborted, the slot freed."""
        if not self.finished:
            self.status = CLIENT_GONE
            self._finish()

    def fail(self, error: GatewayError) -> None:
        """Say it in the way that is still possible: a whole answer, a last event, or a connection that is cut."""
        if self.finished or (self.status == 0 and self.recover is not None and self.recover(error)):
            return
        # Without its traceback, whose frames would keep this exchange and its body until the garbage collector comes.
        self.error, self.refusal = error.message, error.forget_origin()
        if self.status == 0:
            self.reply(error.status, error.headers(), error.body(self.head.path))
            return
        if self._events is not None and not self._events.broken_open:
            self.sink.write(self._events.render_error(error, self.head.path))
            self.sink.end()
        else:
            self.sink.cut()
        self._finish()

    def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """Give an answer of the gateway's own."""
        self.status = status
        found = [*headers, *([(b"content-length", b"%d" % len(body))] if status != 204 else ())]
        if self.cors is not None:
            found += self.cors.list_headers(self.head.named.get(b"origin"))
        if self._pool is not None:
            found += zip((WEIGHTS, DRAFT), self._pool.versions, strict=True)
        self.sink.start(status, [*found, *list_headers(self.head.request_id, self.key, self.fallback_from)])
        if self.head.method != "HEAD":
            self.sink.write(body)
        self.sink.end()
        self._finish()

    def pause(self) -> None:
        """Pause the engine: the client takes no more for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Resume the engine: the client has caught up."""
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    def _go(self, connection: Connection) -> None:
        assert self.engine is not None
        assert self._pool is not None
        self._connection = connection
        self.said = [self.engine.versions]
        origin = self.engine.origin
        keys_are_ours = self.keys_are_ours or origin.has_credential
        lines = origin.lines if self.trace is None else origin.lines + self.trace.enter_engine(origin.site)
        dropped = heads.find_dropped(keys_are_ours, self.trace is not None, self.drops_usage)
        data = heads.render_request(self.head, self._body, lines, origin.site.prefix, self.forwarded_for, dropped)
        if not connection.kept:
            self._body = b""
        if self.held and self.backlog is not None:
            self.backlog.release(self)
        connection.request(data, self, self._pool.waits, bodiless=self.head.method == "HEAD")
        if self._paused:
            connection.pause()
        self.sent_s = time.perf_counter()
        self.engine.stats.added_request.add(self.sent_s - self.arrived_s)

    def on_head(self, status: int, headers: Headers) -> None:
        """Pass on the head of the engine's answer, under the versions of the weights that it has."""
        engine = self.engine
        assert engine is not None
        self.status, self._body, self.recover = status, b"", None
        weights, draft = engine.versions
        if self.said[-1] is not engine.versions:
            # It ran before and after an update of the weights.
            weights, draft = self.said[-1][0] + b", " + weights, self.said[-1][1] + b", " + draft
            self.said.append(engine.versions)
        found = heads.pass_headers(headers, engine.origin.site, limited=self.key is not None and self.key.limited)
        if self.cors is not None:
            found = self.cors.replace_headers(found, self.head.named.get(b"origin"))
        named = dict(found)
        self.streams = named.get(b"content-type", b"").lower().startswith(b"text/event-stream")
        if self.streams and self.head.method != "HEAD":
            self._events, found = frame_events(self.head.path, found, named)
        found += ((UPSTREAM, engine.name.encode()), (WEIGHTS, weights), (DRAFT, draft))
        self.sink.start(status, [*found, *list_headers(self.head.request_id, self.key, self.fallback_from)])

    def on_data(self, data: bytes) -> None:
        """Pass on a piece of the engine's answer."""
        engine = self.engine
        assert engine is not None
        assert self._connection is not None
        now = self._connection.received_s
        if self.first_s is None:
            self.first_s = now
            engine.stats.first.add(now - self.started_s)
        elif self.streams:
            engine.stats.gap.add(now - self.last_s)
        self.last_s = now
        self.chunks += 1
        events = self._events
        if events is None:
            self.recent = keep_usage(self.recent, data)
        else:
            if self.said[-1] is not engine.versions and not events.broken_open:
                # What was written so far are whole events.
                self.said.append(engine.versions)
                self.sink.write(b": x-weight-version: %s, x-draft-version: %s\n\n" % engine.versions)
            # Most events are whole and have no usage: a search or a call for each would be a tenth of what it costs.
            if events.passes and data.endswith(CHOICES_END):
                self.recent = (self.recent[1], data)
            elif not (data := self._take_events(events, data)):
                return
        if self.copy is not None and self.status == 200:
            self.copy.add(data)
        self.sink.write(data)

    def _take_events(self, events: EventStream, data: bytes) -> bytes:
        """Take what is whole by now, without the usage that was asked for in the client's place."""
        if not (events.passes and data.endswith(b"\n\n")) and not (data := events.take(data)):
            return b""
        self.recent = (self.recent[1], data)
        return drop_usage(data) if self.drops_usage and USAGE in data else data

    def on_pause(self) -> None:
        """Note that the engine has sent no more for now."""
        assert self.engine is not None
        assert self._connection is not None
        self.sink.flush()
        self.engine.stats.added_chunk.add(time.perf_counter() - self._connection.received_s)

    def on_end(self) -> None:
        """Note that the engine's answer is complete."""
        assert self.engine is not None
        self.complete, self._connection = True, None
        if self._events is not None and (rest := self._events.end()):
            if self.copy is not None and self.status == 200:
                self.copy.add(rest)
            self.sink.write(rest)
        self.sink.end()
        self.engine.note_success()
        if self.status == 200 and not is_free(self.head.method, self.head.path):
            spread_s = self.last_s - self.first_s if self.streams and self.first_s is not None else None
            self.usage = count_tokens(self.engine.stats, b"".join(self.recent), spread_s)
        self._finish()

    def on_error(self, error: OSError) -> None:
        """Note that the engine broke off or fell silent, or that the client takes nothing."""
        assert self.engine is not None
        assert self._pool is not None
        self._connection = None
        if isinstance(error, StalledError):
            self.error = "the client took nothing for too long"
            self.sink.cut()
            self.leave()
            return
        if isinstance(error, StaleError) and self.status == 0:
            self.wait_for(reach(self, self._pool, len(self._body), afresh=True), self._go)
            return
        self.engine.last_error = str(error)
        self.cause = f"{self.engine.name}: {error}"
        self.fail(errors.engine_silent() if isinstance(error, SilentError) else errors.engine_lost())

    def _finish(self) -> None:
        self.finished, self.recover = True, None
        self.stop_waiting()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        self.let_go()
        if self.copy is not None:
            self.copy.end(whole=self.complete and self.status == 200)
        self._on_finish(self)
        del self.sink  # else the two would keep each other until the garbage collector comes
