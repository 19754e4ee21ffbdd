"""uvicorn's HTTP protocol without six of its habits, for the gateway and its admin port.

An offer to upgrade (h2c of JDK clients and curl, websockets) is ignored, as RFC 9110, section 7.8 allows: llhttp ends
such a request with its head, so that its body would be lost, or read as a request of its own (uvicorn#2722). Trailers
do not become headers. A client that has sent its next request is still read, within bounds, so that its going is
noticed. And what belonged to a connection is free when that is lost, without the garbage collector.

What comes before a body and behind it is bounded, as is what pads its chunks; those of the body itself are its reader's
to bound. What is refused here is refused in the API's own form.
Checked against uvicorn 0.54 (startup_check.py).
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from laguna_serve.serving.gateway.clients import refusals
from laguna_serve.serving.gateway.wire.errors import GatewayError

INVALID = "Invalid HTTP request received."
# Requests that wait behind one of the same connection before that is read no further; their bodies are bounded by
# uvicorn's HIGH_WATER_LIMIT, their heads by the gateway's.
MAX_PIPELINED = 4
OFFERS = frozenset((b"upgrade", b"http2-settings"))


class StrictProtocol(HttpToolsProtocol):
    """One connection of a client."""

    max_head_bytes = 64 * 1024
    # The rest of a body is read and dropped, then the connection closes: else it would take the answer with it.
    lingering = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of a head that has begun and not ended, and what has come since the last part of a body.
        self._head_bytes: int | None = 0
        self._framing_bytes = self._unread = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests, of which no more may be in a head or between two parts of a body than is bounded."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        self._framing_bytes += len(data)
        self._feed(data)
        # A head that has ended by now is not too large, however many bytes came with it.
        if self._head_bytes is not None and self._head_bytes > self.max_head_bytes:
            self.refuse(refusals.head_too_large(self.max_head_bytes))
        elif self._framing_bytes > self.max_head_bytes and self.is_receiving():
            self.send_400_response(INVALID)

    def _feed(self, data: bytes) -> None:
        """Feed the parser, and again without an offer to upgrade where there was one."""
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as offer:
                    data = self._refuse_upgrade() + data[offer.args[0] :]
        except httptools.HttpParserError:
            self.logger.warning(INVALID)
            self.send_400_response(INVALID)

    def _refuse_upgrade(self) -> bytes:
        """Refuse the head without the offer to upgrade that the parser stopped at, for a new parser."""
        head = self._render_plain_head()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return head

    def _render_plain_head(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("a tunnel")
        parts = [method, b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(part for part in value.split(b",") if part.strip().lower() not in OFFERS)
            if name not in OFFERS:
                parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        super().on_message_begin()
        self.note_begin()

    def note_begin(self) -> None:
        """Count the head's bytes from here on, unless they are counted already."""
        if self._head_bytes is None:
            self._head_bytes = 0

    def note_head(self) -> None:
        """Count what comes from here on as a body's."""
        self._head_bytes, self._framing_bytes = None, 0

    def on_headers_complete(self) -> None:
        """Note that the head is there. What a body trails goes to a list of its own, which nobody reads."""
        self.note_head()
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []
            if 0 < len(self.pipeline) <= MAX_PIPELINED:
                self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the body is there, or what the parser takes for all of a request that offers an upgrade."""
        if not self.parser.should_upgrade():
            self.on_request_complete()

    def on_request_complete(self) -> None:
        """Note that the body is there, and that the parser has not stopped at an offer to upgrade."""
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of the API that it was for; uvicorn's is plain text.

        Within a request that is not answered yet it is the answer.
        """
        begun = self.is_receiving() and not self.pipeline and not self.cycle.response_started
        self.refuse(refusals.not_http(), within=begun)

    def refuse(self, error: GatewayError, *, within: bool = False) -> None:
        """Refuse what has begun to come.

        While an earlier request is answered nothing can be said, or it would stand in that answer.
        """
        self._head_bytes = None
        if not self.transport.is_closing():
            if not self.lingering and (within or self.cycle is None or self.cycle.response_complete):
                self.transport.write(refusals.render(error, getattr(self, "url", b"")))
            self.transport.close()

    def reads_on(self) -> bool:
        """Whether the client has answers unread, and fewer bytes of them than at the last look."""
        before, self._unread = self._unread, self.transport.get_write_buffer_size()
        return self._unread > 0 and (not before or self._unread < before)

    def read_on(self) -> None:
        """Read on, unless too many requests wait behind another one."""
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()

    def is_receiving(self) -> bool:
        """Whether a request has begun whose end has not come."""
        return self.cycle is not None and self.cycle.more_body

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a client that is gone, and all that it sent."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for cycle in (self.cycle, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                cycle.body = bytearray()
                cycle.on_response = _do_nothing  # else the two would keep each other
        self.pipeline.clear()


def _do_nothing() -> None:
    pass
