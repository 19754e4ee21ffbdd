"""The admin port's HTTP protocol: uvicorn's, with bodies as large as the gateway's clients may send, and as slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from laguna_serve.serving.gateway.clients import refusals
from laguna_serve.serving.gateway.clients.answer import LINGER_S
from laguna_serve.serving.gateway.clients.strict_http import StrictProtocol
from laguna_serve.serving.gateway.clients.timer import BODY, HEAD, NOTHING, AwaitTimer
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.codings import check_codings
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import read_length


class AdminProtocol(StrictProtocol):
    """One connection of a client of the admin port."""

    header_timeout_s = 10.0
    find_relay: Callable[[], Relay]
    _body_bytes = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer = AwaitTimer(self.loop, self._give_up)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first head from here."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a client that is gone; its timer, too."""
        self._timer.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests, and await what is missing."""
        super().data_received(data)
        self._watch()

    def note_head(self) -> None:
        """Note that a head is there: what is awaited now is waited for from now on."""
        super().note_head()
        self._timer.awaited = NOTHING

    def on_headers_complete(self) -> None:
        """Note that the head is there; the application does not see one whose body is refused."""
        self._body_bytes = 0
        if self.lingering:
            return
        if self.parser.should_upgrade():
            super().on_headers_complete()
            return
        named = dict(reversed(self.headers))
        try:
            check_codings(self.headers, named)
            self.find_relay().check_size(read_length(named) or 0)
        except GatewayError as error:
            self._refuse_body(error)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, unless it is one too many."""
        self._body_bytes += len(body)
        if self.lingering:
            return
        try:
            self.find_relay().check_size(self._body_bytes)
        except GatewayError as error:
            self._refuse_body(error, begun=True)
        else:
            super().on_body(body)

    def on_request_complete(self) -> None:
        """Note that the body is there, whoever takes it."""
        if self.lingering:
            self.transport.close()
        else:
            super().on_request_complete()

    def _watch(self) -> None:
        """Set the timer for what is awaited, as the public port does; the time between two requests is uvicorn's."""
        if self.lingering or self.transport.is_closing():
            awaited, within_s = NOTHING, 0.0
        elif self._head_bytes is not None:
            awaited, within_s = HEAD, self.header_timeout_s
        elif self.is_receiving():
            awaited, within_s = BODY, self.find_relay().config.server.body_timeout_s
        else:
            awaited, within_s = NOTHING, 0.0
        self._timer.expect(awaited, within_s)

    def _give_up(self) -> None:
        """Give up: what was awaited has not come."""
        awaited = self._timer.take()
        busy = self.cycle is not None and not self.cycle.response_complete
        if awaited == BODY:
            self._refuse_body(errors.body_too_slow(), begun=True)
        elif awaited == HEAD and busy:
            self._watch()  # nothing can be said while an earlier request is answered
        elif awaited == HEAD:
            self.refuse(refusals.head_too_slow())

    def _refuse_body(self, error: GatewayError, *, begun: bool = False) -> None:
        """Refuse a body, which may still come for a while; `begun`: the application has its head, and waits for it."""
        self.note_head()
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (busy and not (begun and not self.cycle.response_started)):
            self.transport.close()  # an earlier request is answered, or this one
            return
        if begun:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not (begun and self.cycle.response_complete):
            self.transport.write(refusals.render(error, self.url))
        self.lingering = True
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)


def make_admin_protocol(
    header_timeout_s: float, max_head_bytes: int, find_relay: Callable[[], Relay]
) -> type[AdminProtocol]:
    """Make a class with the gateway's bounds."""
    given = {
        "header_timeout_s": header_timeout_s,
        "max_head_bytes": max_head_bytes,
        "find_relay": staticmethod(find_relay),
    }
    return type("BoundAdminProtocol", (AdminProtocol,), given)
