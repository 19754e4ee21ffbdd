"""An answer, framed in HTTP/1.1 and written in the call in which it comes: the exchange's sink under the gateway's own
protocol (protocol.py)."""

from __future__ import annotations

import asyncio
import http
import socket
import struct
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.relay.sink import can_stay_open, has_body
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Headers, read_head

# How long a client that was refused may go on sending a body: a connection closed under its hands would take the
# answer with it.
LINGER_S = 2.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}
# Close with a reset, and without what is unsent.
RESET = struct.pack("ii", 1, 0)


class Client(Protocol):
    """The protocol of the client's connection, as far as an answer needs it."""

    transport: asyncio.Transport
    flow: FlowControl
    loop: asyncio.AbstractEventLoop
    # The rest of a body is read and dropped, then the connection closes.
    lingering: bool

    def on_response_complete(self) -> None:
        """The next request may begin."""


class Answer:
    """The answer to one request of a client."""

    exchange: Exchange

    def __init__(self, client: Client, cycle: RequestResponseCycle, relay: Relay) -> None:
        self._client, self.cycle, self._transport, self._relay = client, cycle, client.transport, relay
        self._chunked = self._silent = self._ends_with_connection = False
        self._unsent: list[bytes] = []
        self.incomplete = True

    def begin(self) -> None:
        """The head is there; the body perhaps."""
        scope = self.cycle.scope
        headers: Any = scope["headers"]
        peer = scope["client"][0] if scope["client"] else ""
        self._head = read_head(scope["method"], scope["path"], scope["raw_path"], scope["query_string"], headers, peer)
        self.exchange = self._relay.begin(self._head, self)
        if self.exchange.finished:
            return
        if not self.cycle.more_body:
            self.send()
        elif self.cycle.waiting_for_100_continue:
            self._transport.write(CONTINUE)

    def grow(self) -> None:
        """More of the body has come, and not all of it."""
        try:
            self._relay.hold(self.exchange, len(self.cycle.body))
        except GatewayError as error:
            self.exchange.fail(error)
        self._client.flow.resume_reading()  # uvicorn pauses until an application takes it

    def send(self) -> None:
        """The body is there."""
        self.incomplete = False
        body = bytes(self.cycle.body)
        self.cycle.body = bytearray()
        self._client.flow.resume_reading()
        self._relay.send(self.exchange, body)

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
            self._ends_with_connection = not self._chunked
            cycle.keep_alive = cycle.keep_alive and self._chunked
            if self._chunked:
                parts.append(b"transfer-encoding: chunked\r\n")
        if cycle.more_body and has_body(self._head):  # refused before its body was there
            cycle.keep_alive = cycle.keep_alive and can_stay_open(self._head)
            self._client.lingering = not cycle.keep_alive
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
        cycle = self.cycle
        cycle.body = bytearray()
        cycle.response_complete = True
        if self._client.lingering:
            self._client.loop.call_later(LINGER_S, self._transport.close)
        elif not cycle.keep_alive:
            self._transport.close()
        self._client.on_response_complete()

    def cut(self) -> None:
        """Close the connection in the middle. A client of HTTP/1.0 would take its end for the body's: it is reset."""
        self.flush()
        self.cycle.body = bytearray()
        if self._ends_with_connection:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # a client that takes nothing would keep it open
        else:
            self._transport.close()

    def give_up(self) -> None:
        """The body did not come."""
        self.exchange.fail(errors.body_too_slow())
