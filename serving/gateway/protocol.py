"""uvicorn's HTTP protocol, which takes requests for engines straight to the relay, and bounds what comes before a
request is there: how long its head may take, how large it may be.

uvicorn parses, keeps connections alive, queues pipelined requests and shuts down as always; only where it would start
the application's task for a request, an exchange begins instead, and its answer is written in the call in which it
comes. Leans on `HttpToolsProtocol._start_asgi_task` and `RequestResponseCycle`; checked against uvicorn 0.54.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.errors import GatewayError
from laguna_serve.serving.gateway.exchange import Exchange
from laguna_serve.serving.gateway.headers import Headers, read_head
from laguna_serve.serving.gateway.relay import Relay

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# How long a client that was refused may go on sending a body: a connection closed under its hands would take the
# answer with it.
LINGER_S = 2.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
logger = logging.getLogger(__name__)
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}


class Turns:
    """Lets one request begin per turn of the event loop, so that of many that come at once the first has its answer
    before the last is read, and streams go on in between."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._taken = False

    def enter(self, loop: asyncio.AbstractEventLoop, begin: Callable[[], None]) -> None:
        """Call `begin` now if this turn is free, or in a later one."""
        if self._taken:
            self._waiting.append(begin)
        else:
            self._taken = True
            loop.call_soon(self._go_on, loop)
            begin()

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._taken = bool(self._waiting)
        if self._taken:
            loop.call_soon(self._go_on, loop)
            self._waiting.popleft()()


class GatewayProtocol(HttpToolsProtocol):
    """One connection of a client. What is the gateway's own is given by `make_protocol`, as uvicorn makes instances."""

    head_timeout_s = 10.0
    max_head_bytes = 64 * 1024
    own_paths: frozenset[str] = frozenset()
    find_relay: Callable[[], Relay]
    turns: Turns

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes: int | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer: _Answer | None = None
        self._relay = self.find_relay()
        self._body_timer: asyncio.TimerHandle | None = None
        self._held: list[bytes] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited from here."""
        super().connection_made(transport)
        if len(self.connections) > self._relay.max_connections:
            self._relay.journal.note_too_many_connections(self._relay.max_connections)
            transport.write(TOO_MANY)
            transport.close()
            return
        self._head_bytes = 0
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone. No timer outlives its connection."""
        self._end_head()
        self._end_body()
        super().connection_lost(exc)
        if self._answer is not None:
            self._answer.leave()
            self._answer = None

    def data_received(self, data: bytes) -> None:
        """A request that begins waits for its turn; what belongs to one that has begun does not."""
        self._held.append(data)
        if len(self._held) == 1:
            if self._answer is None:
                self.turns.enter(self.loop, self._take_held)
            else:
                self._take_held()

    def _take_held(self) -> None:
        held, self._held = self._held, []
        for data in held:
            if self.parser is not None:  # the connection is there
                self._take(data)

    def _take(self, data: bytes) -> None:
        """Bytes of a head are counted; those of a body are the relay's to bound."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that is there by now is none of these bytes' business, however many they are.
        if self._head_bytes is not None and self._head_bytes > self.max_head_bytes:
            self._refuse(TOO_LARGE)
        self._watch()

    def on_message_begin(self) -> None:
        """A later request on this connection: uvicorn's own timer has watched the time between."""
        super().on_message_begin()
        if self._head_bytes is None:
            self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body; of the request that is being answered, it is kept whole."""
        super().on_body(body)
        if self._answer is not None and self._answer.cycle is self.cycle:
            self._answer.grow()

    def on_message_complete(self) -> None:
        """The body is there."""
        super().on_message_complete()
        if self._answer is not None and self._answer.cycle is self.cycle:
            self._end_body()
            self._answer.send()

    def pause_writing(self) -> None:
        """The client takes no more for now: neither does the engine's connection."""
        super().pause_writing()
        if self._answer is not None:
            self._answer.exchange.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._answer is not None:
            self._answer.exchange.resume()

    def on_response_complete(self) -> None:
        """The next request of this connection may begin."""
        self._answer = None
        self._end_body()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["path"] in self.own_paths:
            super()._start_asgi_task(cycle, app)
            return
        self._answer = answer = _Answer(self, cycle)
        try:
            answer.begin(self._relay)
        except Exception:  # uvicorn would call it an invalid request
            logger.exception("%s %s", cycle.scope["method"], cycle.scope["path"])
            self.transport.abort()

    def _watch(self) -> None:
        """Of what came in pieces, the rest must come in time. Most requests come whole, and need no timer."""
        if self._head_bytes is not None and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, TOO_SLOW)
        elif self._answer is not None and self._answer.incomplete and self._body_timer is None:
            self._body_timer = self.loop.call_later(self._relay.config.server.body_timeout_s, self._answer.give_up)

    def _end_head(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_body(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _refuse(self, answer: bytes) -> None:
        """Of a later request while an earlier one is answered nothing can be said, or it would stand in that answer."""
        if self._is_busy() and answer is TOO_SLOW:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, TOO_SLOW)
            return
        self._end_head()
        if not self.transport.is_closing():
            if not self._is_busy():
                self.transport.write(answer)
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        if self._is_busy():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class _Answer:
    """The answer to one request, framed for its client: the exchange's sink."""

    exchange: Exchange

    def __init__(self, protocol: GatewayProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol, self.cycle, self._transport = protocol, cycle, protocol.transport
        self._chunked = self._silent = False
        self._unsent: list[bytes] = []
        self.incomplete = True

    def begin(self, relay: Relay) -> None:
        """The head is there; the body perhaps."""
        scope = self.cycle.scope
        self._relay = relay
        headers: Any = scope["headers"]
        peer = scope["client"][0] if scope["client"] else ""
        head = read_head(scope["method"], scope["path"], scope["raw_path"], scope["query_string"], headers, peer)
        self.exchange = relay.begin(head, self)
        if self.exchange.finished:
            return
        if not self.cycle.more_body:
            self.send()
            return
        if self.cycle.waiting_for_100_continue:
            self._transport.write(CONTINUE)

    def grow(self) -> None:
        """More of the body has come."""
        try:
            self._relay.hold(self.exchange, len(self.cycle.body))
        except GatewayError as error:
            self.exchange.fail(error)
        self._protocol.flow.resume_reading()  # uvicorn waits for an application to take it

    def send(self) -> None:
        """The body is there."""
        self.incomplete = False
        body = bytes(self.cycle.body)
        self.cycle.body = bytearray()
        self._relay.send(self.exchange, body)

    def leave(self) -> None:
        """The client is gone."""
        self.exchange.leave()

    def start(self, status: int, headers: Headers) -> None:
        """The head. Without a length the body is chunked, or ends with the connection for HTTP/1.0."""
        cycle = self.cycle
        cycle.response_started = True
        self._silent = cycle.scope["method"] == "HEAD" or status in (204, 304)
        parts = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        length = False
        for name, value in headers:
            length = length or name == b"content-length"
            parts += (name, b": ", value, b"\r\n")
        if not length and not self._silent:
            self._chunked = cycle.scope["http_version"] == "1.1"
            cycle.keep_alive = cycle.keep_alive and self._chunked
            if self._chunked:
                parts.append(b"transfer-encoding: chunked\r\n")
        if cycle.more_body:
            cycle.keep_alive = False  # refused before its body was there
        if not cycle.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        self._unsent += parts

    def write(self, data: bytes) -> None:
        """A chunk."""
        if self._chunked:
            self._unsent.append(b"%x\r\n%b\r\n" % (len(data), data))
        elif not self._silent:
            self._unsent.append(data)

    def flush(self) -> None:
        """A system call for all that has come at once: it is what a chunk costs most."""
        if self._unsent:
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._transport.write(data)

    def end(self) -> None:
        """The body is complete."""
        if self._chunked:
            self._unsent.append(b"0\r\n\r\n")
        self.flush()
        self.cycle.response_complete = True
        if self.cycle.more_body:
            self._protocol.loop.call_later(LINGER_S, self._transport.close)
        elif not self.cycle.keep_alive:
            self._transport.close()
        self._protocol.on_response_complete()

    def cut(self) -> None:
        """Close the connection in the middle."""
        self.flush()
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # a client that takes nothing would keep it open
        else:
            self._transport.close()

    def give_up(self) -> None:
        """The body did not come."""
        self.exchange.fail(errors.body_too_slow())


def make_protocol(
    head_timeout_s: float, max_head_bytes: int, own_paths: frozenset[str], find_relay: Callable[[], Relay]
) -> type[GatewayProtocol]:
    """A class with these bounds; paths in `own_paths` go to the application."""
    given = {
        "head_timeout_s": head_timeout_s,
        "max_head_bytes": max_head_bytes,
        "own_paths": own_paths,
        "find_relay": staticmethod(find_relay),
        "turns": Turns(),
    }
    return type("BoundProtocol", (GatewayProtocol,), given)
