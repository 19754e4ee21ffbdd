"""uvicorn's HTTP protocol without four of its habits, for the gateway and its admin port.

An offer to upgrade (h2c of JDK clients and curl, websockets) is ignored, as RFC 9110, section 7.8 allows: llhttp ends
such a request with its head, so that its body would be lost, or read as a request of its own (uvicorn#2722). Trailers
do not become headers. A client that has sent its next request is still read, within bounds, so that its going is
noticed. And what belonged to a connection is free when that is lost, without the garbage collector.
Checked against uvicorn 0.54 (startup_check.py).
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

INVALID = "Invalid HTTP request received."
# Requests that wait behind one of the same connection before that is read no further; their bodies are bounded by
# uvicorn's HIGH_WATER_LIMIT, their heads by the gateway's.
MAX_PIPELINED = 4
OFFERS = frozenset((b"upgrade", b"http2-settings"))


class StrictProtocol(HttpToolsProtocol):
    """One connection of a client."""

    def data_received(self, data: bytes) -> None:
        """Bytes of requests, fed again without an offer to upgrade where there was one."""
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

    def on_headers_complete(self) -> None:
        """Note that the head is there. What a body trails goes to a list of its own, which nobody reads."""
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []
            if 0 < len(self.pipeline) <= MAX_PIPELINED:
                self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """Note that the body is there, or what the parser takes for all of a request that offers an upgrade."""
        if not self.parser.should_upgrade():
            self.on_request_complete()

    def on_request_complete(self) -> None:
        """Note that the body is there, and that the parser has not stopped at an offer to upgrade."""
        super().on_message_complete()

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
