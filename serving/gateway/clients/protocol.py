"""uvicorn's HTTP protocol, which takes requests for engines straight to the relay, and bounds what comes before a
request is there: how long its head may take, how large it may be.

uvicorn parses, keeps connections alive, queues pipelined requests and shuts down as always; only where it would start
the application's task for a request, an exchange begins instead, and its answer is written in the call in which it
comes. Leans on `HttpToolsProtocol._start_asgi_task` and `RequestResponseCycle`; checked against uvicorn 0.54.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from laguna_serve.serving.gateway.clients.answer import Answer
from laguna_serve.serving.gateway.clients.strict_http import INVALID, StrictProtocol
from laguna_serve.serving.gateway.clients.turns import Turns
from laguna_serve.serving.gateway.relay.relay import Relay

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
logger = logging.getLogger(__name__)


class GatewayProtocol(StrictProtocol):
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
        self._answer: Answer | None = None
        self._relay = self.find_relay()
        self._body_timer: asyncio.TimerHandle | None = None
        self._framing_bytes = 0
        self.lingering = False
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
        self._held.clear()
        super().connection_lost(exc)
        if self._answer is not None:
            self._answer.exchange.leave()
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
        """Bytes of a head are counted, and those between two parts of a body (chunk extensions, trailers); those of the
        body itself are the relay's to bound."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._answer is not None and self._answer.incomplete:
            self._answer.grow()
        # A head that has ended by now is not too large, however many bytes came with it.
        if self._head_bytes is not None and self._head_bytes > self.max_head_bytes:
            self._refuse(TOO_LARGE)
        elif self._framing_bytes > self.max_head_bytes and self.is_receiving():
            self.send_400_response(INVALID)
        self._watch()

    def on_message_begin(self) -> None:
        """A later request on this connection: uvicorn's own timer has watched the time between."""
        super().on_message_begin()
        if self._head_bytes is None:
            self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._end_head()
        self._framing_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._framing_bytes = 0
        super().on_body(body)

    def on_request_complete(self) -> None:
        """The body is there."""
        super().on_request_complete()
        if self.lingering:
            self.transport.close()
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
        if self.lingering or self.transport.is_closing():
            return  # what follows the last request of a connection is nobody's
        if cycle.scope["path"] in self.own_paths:
            super()._start_asgi_task(cycle, app)
            return
        self._answer = answer = Answer(self, cycle, self._relay)
        try:
            answer.begin()
        except Exception:  # uvicorn would call it an invalid request
            logger.exception("%s %s", cycle.scope["method"], cycle.scope["path"])
            self.transport.abort()

    def _watch(self) -> None:
        """Of what came in pieces, the rest must come in time. Most requests come whole, and need no timer."""
        if self._head_bytes is not None and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, TOO_SLOW)
        elif self._answer is not None and self._answer.incomplete and self._body_timer is None:
            self._body_timer = self.loop.call_later(self._relay.config.server.body_timeout_s, self._answer.give_up)
        elif self._answer is None and self.timeout_keep_alive_task is None and not self._is_busy():
            # The rest of a body that was not awaited: uvicorn's timer ended when it came.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

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
        """What came is no HTTP. Behind a request it may not stand in that one's answer; within one it is the answer."""
        answer = self._answer
        if (
            answer is not None
            and answer.cycle is self.cycle
            and answer.incomplete
            and not answer.cycle.response_started
        ):
            answer.exchange.leave()
        elif self.lingering or self._is_busy():
            self.transport.close()
            return
        super().send_400_response(msg)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


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
