"""uvicorn's HTTP protocol, which takes requests for engines straight to the relay.

It also bounds what comes before a request is there: how long its head may take, how large it may be.

uvicorn parses, keeps connections and queues pipelined requests and shuts down as always; only a request for an engine
gets an `Answer` in the place of uvicorn's cycle and task, and what the engine sends is written in the call in which it
comes. Leans on private parts of `HttpToolsProtocol`; checked against uvicorn 0.54 (startup_check.py).
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from laguna_serve.serving.gateway.clients import refusals
from laguna_serve.serving.gateway.clients.answer import Answer
from laguna_serve.serving.gateway.clients.strict_http import MAX_PIPELINED, StrictProtocol
from laguna_serve.serving.gateway.clients.timer import BODY, HEAD, NEXT, NOTHING, AwaitTimer
from laguna_serve.serving.gateway.clients.turns import Turns
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.wire.headers import read_head

# Requests of one connection that are begun before others have their turn: that came at once, or waited.
MOST_AT_ONCE = 16
logger = logging.getLogger(__name__)


class GatewayProtocol(StrictProtocol):
    """One connection of a client. What is the gateway's own is given by `make_protocol`, as uvicorn makes instances."""

    header_timeout_s = 10.0
    own_paths: frozenset[str] = frozenset()
    find_relay: Callable[[], Relay]
    turns: Turns
    # An Answer, or uvicorn's own for a request that goes to the application.
    cycle: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._relay = self.find_relay()
        self._timer = AwaitTimer(self.loop, self._give_up)
        self._answer: Answer | None = None
        # What was begun last; of those that wait behind it some are being begun.
        self._begun: Any = None
        self._going_on, self._at_once = False, 0
        self._held, self._peer = list[bytes](), ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first head from here. As uvicorn's, without the addresses that only a scope needs."""
        self.connections.add(self)
        self.transport, self.flow = transport, FlowControl(transport)
        if len(self.connections) > self._relay.max_connections:
            self._relay.journal.note_too_many_connections(self._relay.max_connections)
            transport.write(refusals.render(refusals.too_many_connections()))
            transport.close()
            return
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a client that is gone. No timer outlives its connection, and nothing of it stays behind."""
        self._timer.close()
        self._held.clear()
        super().connection_lost(exc)
        self.cycle = self._begun = None
        if self._answer is not None:
            self._answer.exchange.leave()
            self._answer = None

    def data_received(self, data: bytes) -> None:
        """Let a request that begins wait for its turn; what belongs to one that has begun does not."""
        if self._held:
            self._held.append(data)
            self.flow.pause_reading()
        elif self._answer is not None or self.turns.take(self.loop):
            self._take(data)
        else:
            self._held.append(data)
            self.turns.wait(self._take_held)

    def _take_held(self) -> None:
        held, self._held = self._held, []
        if len(held) > 1:
            self.flow.resume_reading()
        for data in held:
            if self.parser is not None:  # the connection is there
                self._take(data)

    def _take(self, data: bytes) -> None:
        if self._timer.awaited == NEXT and not self.flow.write_paused:
            self._timer.awaited = NOTHING
        self._at_once = 0
        super().data_received(data)
        self._go_on_soon()
        self._watch()

    def _feed(self, data: bytes) -> None:
        super()._feed(data)
        if self._answer is not None and self._answer.incomplete:
            self._answer.grow()

    def on_message_begin(self) -> None:
        """Note that a request begins; the time between two has been watched."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self.note_begin()

    def on_headers_complete(self) -> None:
        """Note that the head of a request is there.

        It is of a request for an engine, for the gateway itself, or of one to be read without its offer to upgrade.
        """
        self.note_head()
        parser = self.parser
        if parser.should_upgrade():
            return
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        if "%" in path:
            path = urllib.parse.unquote(path)
        if path in self.own_paths:
            self._begin_own()
            return
        headers, self.headers = self.headers, []  # what a body trails goes to a list that nobody reads
        version = parser.get_http_version()
        head = read_head(parser.get_method().decode("ascii"), path, url.path, url.query or b"", headers, self._peer)
        answer = Answer(
            self,
            self._relay,
            head,
            version,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            expects_continue=self.expect_100_continue and version != "1.0",
        )
        before, self.cycle = self.cycle, answer
        self._at_once += 1
        may_begin = self._at_once <= MOST_AT_ONCE and not self.flow.write_paused
        if may_begin and (before is None or before.response_complete):
            self._start_asgi_task(answer, self.app)
        else:
            self.pipeline.appendleft((answer, self.app))  # type: ignore[arg-type]
            if len(self.pipeline) > MAX_PIPELINED:
                self.flow.pause_reading()

    def _begin_own(self) -> None:
        """As uvicorn begins any: with a scope, which it makes where a request begins."""
        self.server, self.client = get_local_addr(self.transport), get_remote_addr(self.transport)
        self.scheme = "https" if is_ssl(self.transport) else "http"
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._framing_bytes = 0
        answer = self.cycle
        if not isinstance(answer, Answer):
            super().on_body(body)
        elif not answer.response_complete:
            answer.add(body)
            if answer is not self._answer and len(answer.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()  # it is not its turn yet

    def on_request_complete(self) -> None:
        """Note that the body is there; what its request is for takes it."""
        answer = self.cycle
        if not isinstance(answer, Answer):
            super().on_request_complete()
            return
        if not answer.response_complete:
            answer.more_body = False
        if self.lingering:
            self.transport.close()
        if answer is self._answer:
            answer.send()

    def pause_writing(self) -> None:
        """Pause the engine's connection: the client takes no more for now."""
        super().pause_writing()
        if self._answer is not None and self._answer.taken:
            self._answer.exchange.pause()

    def resume_writing(self) -> None:
        """Resume the engine's connection, or go on with what waits: the client has caught up."""
        super().resume_writing()
        if self._answer is not None and self._answer.taken:
            self._answer.exchange.resume()
        self._go_on_soon()

    def on_response_complete(self) -> None:
        """Let the next request of this connection begin."""
        self._answer = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.read_on()
        self._go_on_soon()
        if not self._going_on:
            self._watch()

    def _go_on_soon(self) -> None:
        """Go on when what calls this has ended: the last answer has given back all that it had by then."""
        if not self._going_on and self._may_begin():
            self._going_on = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begin what waits behind the last answer, until something takes longer; more of it than a few, in turns."""
        for _ in range(MOST_AT_ONCE):
            if self._may_begin():
                begun = self.pipeline.pop()
                self.read_on()
                self._start_asgi_task(*begun)
        self._going_on = False
        self._go_on_soon()
        if not self.transport.is_closing():
            self._watch()

    def _may_begin(self) -> bool:
        return bool(self.pipeline) and self._is_free() and not (self.flow.write_paused or self.transport.is_closing())

    def _is_free(self) -> bool:
        return self._begun is None or self._begun.response_complete

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn ends its timer for idle connections here; ours is one for everything."""

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if self.lingering or self.transport.is_closing():
            return  # what follows the last request of a connection is nobody's
        self._begun = cycle
        if not isinstance(cycle, Answer):
            super()._start_asgi_task(cycle, app)
            return
        self._answer = cycle
        try:
            cycle.begin()
        except Exception:  # uvicorn would call it an invalid request
            logger.exception("%s %s", cycle.head.method, cycle.head.path)
            self._answer = None
            self.transport.abort()

    def _watch(self) -> None:
        """Set the timer for what is awaited, counted from where its waiting began.

        Most requests come whole, and are not waited for.
        """
        within_s: float
        if self.flow.write_paused and self._is_free():
            awaited, within_s = NEXT, self.timeout_keep_alive  # that the client reads the answers that it has
        elif self._head_bytes is not None:
            awaited, within_s = HEAD, self.header_timeout_s
        elif self._answer is not None:
            awaited, within_s = BODY if self._answer.incomplete else NOTHING, self._relay.config.server.body_timeout_s
        else:
            # Also the rest of a body that nobody waits for.
            awaited, within_s = NOTHING if self._is_busy() else NEXT, self.timeout_keep_alive
        self._timer.expect(awaited, within_s)

    def _give_up(self) -> None:
        """Give up: what was awaited has not come."""
        awaited = self._timer.take()
        if awaited == HEAD:
            if self._is_busy():
                self._watch()
            else:
                self.refuse(refusals.head_too_slow())
        elif awaited == BODY and self._answer is not None:
            self._answer.give_up()
        elif awaited == NEXT and self.reads_on() and not self.pipeline:
            self._watch()
        elif awaited == NEXT:
            self.transport.abort() if self._unread else self.timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuse what came, which is no HTTP.

        Behind a request it may not stand in that one's answer; within one it is the answer.
        """
        answer = self._answer
        within = answer is not None and answer is self.cycle and answer.incomplete and not answer.response_started
        if within and answer is not None:
            answer.exchange.leave()
        self.refuse(refusals.not_http(), within=within)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


def make_protocol(
    header_timeout_s: float, max_head_bytes: int, own_paths: frozenset[str], find_relay: Callable[[], Relay]
) -> type[GatewayProtocol]:
    """Make a class with these bounds; paths in `own_paths` go to the application."""
    given = {
        "header_timeout_s": header_timeout_s,
        "max_head_bytes": max_head_bytes,
        "own_paths": own_paths,
        "find_relay": staticmethod(find_relay),
        "turns": Turns(),
    }
    return type("BoundProtocol", (GatewayProtocol,), given)
