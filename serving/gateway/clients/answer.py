"""An answer, framed in HTTP/1.1 and written in the call in which it comes.

It is the exchange's sink under the gateway's own protocol (protocol.py).
"""

from __future__ import annotations

import asyncio
import http
import socket
import struct
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.relay.sink import can_stay_open, has_body
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Head, Headers

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
        """Let the next request begin."""


class _Unawaited:
    """An event that uvicorn sets, and that nobody waits for."""

    def set(self) -> None:
        pass


class Answer:
    """The answer to one request of a client.

    It stands where uvicorn has a RequestResponseCycle, with what its protocol uses of one: whole requests need neither
    an ASGI scope nor a task.

    `incomplete`: the relay still waits for the body; `more_body`: its end has not come, whether anybody waits or not.
    `taken`: the relay has it, so that there is an exchange.
    """

    __slots__ = (
        "_chunked",
        "_client",
        "_ends_with_connection",
        "_relay",
        "_silent",
        "_transport",
        "_unsent",
        "body",
        "disconnected",
        "exchange",
        "expects_continue",
        "head",
        "http_version",
        "incomplete",
        "keep_alive",
        "more_body",
        "on_response",
        "response_complete",
        "response_started",
        "taken",
    )
    exchange: Exchange
    on_response: object
    message_event = _Unawaited()

    def __init__(
        self, client: Client, relay: Relay, head: Head, http_version: str, *, keep_alive: bool, expects_continue: bool
    ) -> None:
        self._client, self._relay, self._transport = client, relay, client.transport
        self.head, self.http_version = head, http_version
        self.keep_alive, self.expects_continue = keep_alive, expects_continue
        self.body: bytes | bytearray = b""
        self.more_body = self.incomplete = True
        self.taken = False
        self.response_started = self.response_complete = self.disconnected = False
        self._chunked = self._silent = self._ends_with_connection = False
        self._unsent: list[bytes] = []

    def begin(self) -> None:
        """Take this request's turn. Its body may be there already, if it waited behind another one."""
        self.exchange = self._relay.begin(self.head, self)
        self.taken = True
        if self.exchange.finished:
            return
        if not self.more_body:
            self.send()
        elif self.expects_continue:
            self._transport.write(CONTINUE)

    def add(self, data: bytes) -> None:
        """Add a part of the body; most come in one."""
        if not self.body:
            self.body = data
            return
        if not isinstance(self.body, bytearray):
            self.body = bytearray(self.body)
        self.body += data

    def grow(self) -> None:
        """More of the body has come, and not all of it."""
        try:
            self._relay.hold(self.exchange, len(self.body))
        except GatewayError as error:
            self.exchange.fail(error)

    def send(self) -> None:
        """Send the body, which is there, on to the relay, of whose answer this is the sink."""
        self.incomplete = False
        body, self.body = bytes(self.body), b""
        self._relay.send(self.exchange, body)

    def start(self, status: int, headers: Headers) -> None:
        """Write the head. Without a length the body is chunked, or ends with the connection for HTTP/1.0."""
        self.response_started = True
        self._silent = self.head.method == "HEAD" or status in (204, 304)
        parts = self._unsent
        parts.append(STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status)
        length = False
        for name, value in headers:
            length = length or name == b"content-length"
            parts += (name, b": ", value, b"\r\n")
        if not length and not self._silent:
            self._chunked = self.http_version == "1.1"
            self._ends_with_connection = not self._chunked
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                parts.append(b"transfer-encoding: chunked\r\n")
        if self.more_body and has_body(self.head):  # refused before its body was there
            self.keep_alive = self.keep_alive and can_stay_open(self.head)
            self._client.lingering = not self.keep_alive
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")

    def write(self, data: bytes) -> None:
        if self._chunked:
            self._unsent.append(b"%x\r\n%b\r\n" % (len(data), data))
        elif not self._silent:
            self._unsent.append(data)

    def flush(self) -> None:
        """Make one system call for all that has come at once: it is what a chunk costs most."""
        if self._unsent:
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._transport.write(data)

    def end(self) -> None:
        """End the body, which is complete."""
        if self._chunked:
            self._unsent.append(b"0\r\n\r\n")
        self.flush()
        self.body = b""
        self.response_complete = True
        if self._client.lingering:
            self._client.loop.call_later(LINGER_S, self._transport.close)
        elif not self.keep_alive:
            self._transport.close()
        self._client.on_response_complete()

    def cut(self) -> None:
        """Close the connection in the middle. A client of HTTP/1.0 would take its end for the body's: it is reset."""
        self.flush()
        self.body = b""
        if self._ends_with_connection:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # a client that takes nothing would keep it open
        else:
            self._transport.close()

    def give_up(self) -> None:
        """Give up a request whose body did not come."""
        self.exchange.fail(errors.body_too_slow())
