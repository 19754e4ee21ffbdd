"""uvicorn's HTTP protocol with bounds on what comes before a request is there: how long its head may take, how large it
may be. Without them a client that sends a byte now and then, or headers without end, is kept for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class GuardedProtocol(HttpToolsProtocol):
    """One connection. The bounds are class attributes: `bound` makes a class with others."""

    head_timeout_s = 10.0
    max_head_bytes = 64 * 1024

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes: int | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited from here."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives its connection."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head are counted; those of a body are the application's to bound."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that is there by now is none of these bytes' business, however many they are.
        if self._head_bytes is not None and self._head_bytes > self.max_head_bytes:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """A later request on this connection: uvicorn's own timer has watched the time between."""
        super().on_message_begin()
        if self._head_bytes is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._end_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, TOO_SLOW)

    def _end_head(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, answer: bytes) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def bound(head_timeout_s: float, max_head_bytes: int) -> type[GuardedProtocol]:
    """A class with these bounds, as uvicorn makes the instances itself."""
    bounds = {"head_timeout_s": head_timeout_s, "max_head_bytes": max_head_bytes}
    return type("BoundProtocol", (GuardedProtocol,), bounds)
