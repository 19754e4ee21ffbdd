"""An HTTP/1.1 client for the relay: what an engine sends is handed on in the call in which it arrives.

On httptools' parser (llhttp, as in uvicorn and Node.js). A general client puts a queue and a task switch between the
socket and its reader; per event of a stream those cost more than all the rest (bench/gateway.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import ssl
import time
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from laguna_serve.serving.gateway.config import Endpoint

# vLLM's HTTP server closes an idle connection after 5 s; reusing one about to be closed fails the request.
KEEPALIVE_S = 3.0
MOST_HEAD_BYTES = 1 << 20
logger = logging.getLogger(__name__)


# This machine has run out of something: no fault of the engine's.
LOCAL_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class UnreachableError(ConnectionError):
    """No connection could be made: nothing was sent. `silent`: nobody answered in time; `shortage`: this machine has
    no file descriptor or memory left for it."""

    def __init__(self, error: OSError, timeout_s: float) -> None:
        # Several addresses of a name: asyncio puts their errors into one text.
        codes = {int(code) for code in re.findall(r"\[Errno (\d+)\]", str(error))} | {error.errno}
        self.silent = isinstance(error, TimeoutError)
        self.shortage = bool(codes & LOCAL_SHORTAGE)
        if self.silent:
            reason = f"no connection within {timeout_s:g} s"
        elif isinstance(error, ssl.SSLCertVerificationError):
            reason = f"certificate: {error.verify_message}"
        else:
            reason = "connection refused" if errno.ECONNREFUSED in codes else error.strerror or type(error).__name__
        super().__init__(reason)


class BrokenError(ConnectionError):
    """The connection ended, or what came was no HTTP, before the answer was complete."""


class SilentError(TimeoutError):
    """Nothing came for too long."""


class StalledError(TimeoutError):
    """What came was not taken for too long."""


class Receiver(Protocol):
    """Who is told of an answer. After `on_end` or `on_error` nothing more comes."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status and headers, names as they were sent."""

    def on_data(self, data: bytes) -> None:
        """A piece of the body, freed of its framing: a chunk, or the part of one that has arrived."""

    def on_pause(self) -> None:
        """All that has arrived by now was told."""

    def on_end(self) -> None:
        """The answer is complete."""

    def on_error(self, error: OSError) -> None:
        """BrokenError, SilentError or StalledError: there will be no more of it."""


class Connection(asyncio.Protocol):
    """One connection to an engine; one request at a time."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.idle_since = self.received_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes: int | None = 0
        self._bodiless = self._framed = self._paused = False
        self._active_s, self._silence_s = 0.0, 0.0

    def request(self, data: bytes, receiver: Receiver, silence_s: float, *, bodiless: bool) -> None:
        """Send a whole request, framed; `receiver` is told of its answer. `bodiless`: the answer will have no body,
        whatever its headers say (HEAD)."""
        assert self._receiver is None
        self._reset()
        self._receiver, self._bodiless, self._silence_s = receiver, bodiless, silence_s
        if self._transport is None:
            # It was lost since it was taken.
            self._loop.call_soon(self._fail, BrokenError("connection lost"))
        else:
            self._transport.write(data)
        self._active_s = self._loop.time()
        self._timer = self._loop.call_later(silence_s, self._check_silence)

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and not self._paused:
            self._paused, self._active_s = True, self._loop.time()
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self._paused:
            self._paused, self._active_s = False, self._loop.time()
            self._transport.resume_reading()

    def abort(self) -> None:
        """Leave in the middle: the engine aborts its work. The receiver is not told."""
        self._release()
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    @property
    def lost(self) -> bool:
        """It cannot be used any more."""
        return self._transport is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine has closed, or died."""
        self._transport = None
        self._origin.forget(self)
        if self._receiver is not None and self._head_bytes is None and not self._framed:
            self._complete()  # a body that ends where the connection does
        else:
            self._fail(BrokenError("connection lost"))

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if self._receiver is None:
            self.close()  # nothing was asked
            return
        self._active_s, self.received_s = self._loop.time(), time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if isinstance(error, httptools.HttpParserCallbackError):
                logger.exception("an answer could not be handed on")
            self.close()
            self._fail(BrokenError("no HTTP"))
            return
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self.close()
                self._fail(BrokenError("head without end"))
        if self._receiver is not None:
            self._receiver.on_pause()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of the parser."""
        self._headers.append((name, value))
        lowered = name.lower()
        self._framed = self._framed or lowered == b"content-length" or lowered == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        """Of the parser."""
        status = self._parser.get_status_code()
        if status < 200:  # interim: the answer follows
            return
        if self._receiver is None:  # an answer more than was asked for
            self.close()
            return
        self._head_bytes = None
        self._receiver.on_head(status, self._headers)
        if self._bodiless:
            self._complete(reusable=False)  # the parser waits for the body

    def on_body(self, data: bytes) -> None:
        """Of the parser."""
        if self._receiver is not None:
            self._receiver.on_data(data)

    def on_message_complete(self) -> None:
        """Of the parser."""
        if self._head_bytes is not None:
            self._headers = []
        elif self._receiver is not None:
            self._complete(reusable=self._framed and self._parser.should_keep_alive())

    def _complete(self, *, reusable: bool = False) -> None:
        receiver = self._release()
        if reusable:
            self.resume()
            self._origin.keep(self)
        else:
            self.close()
        if receiver is not None:
            receiver.on_end()

    def _fail(self, error: OSError) -> None:
        if (receiver := self._release()) is not None:
            receiver.on_error(error)

    def _release(self) -> Receiver | None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        receiver, self._receiver = self._receiver, None
        return receiver

    def _check_silence(self) -> None:
        """One timer for a whole answer, moved on instead of set anew with every chunk."""
        if self._origin.silence_allowed:
            self._active_s = self._loop.time()
        left = self._active_s + self._silence_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
        else:
            self.close()
            self._fail(StalledError("stalled") if self._paused else SilentError("silent"))


class Origin:
    """An engine's address, and the connections to it that are open and idle. While `silence_allowed` (the engine is
    paused) no answer is given up for it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (80 if self._tls is None else 443)
        self._closed = False
        self.prefix, self.authority = parts.path.rstrip("/").encode(), parts.netloc.encode()
        # The header lines that every request to this engine has.
        self.lines = b"host: " + self.authority + b"\r\n"
        self.has_credential = self.silence_allowed = False
        self._idle: list[Connection] = []

    def configure(self, endpoint: Endpoint) -> None:
        """The credential and the authorities of a configuration that has the same URL."""
        authorization = endpoint.authorization
        self._tls, self.has_credential = endpoint.tls, authorization is not None
        self.lines = b"host: " + self.authority + b"\r\n"
        if authorization is not None:
            self.lines += b"authorization: " + authorization.encode() + b"\r\n"

    def take(self) -> Connection | None:
        """An idle connection, if there is one."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and now - connection.idle_since < KEEPALIVE_S:
                return connection
            connection.close()
        return None

    async def connect(self, timeout_s: float) -> Connection:
        """A new connection. Raises UnreachableError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, made = await loop.create_connection(lambda: Connection(self), self._host, self._port, ssl=self._tls)
        except OSError as error:  # TimeoutError is one
            raise UnreachableError(error, timeout_s) from None
        return made

    def keep(self, connection: Connection) -> None:
        """Its answer is complete; the next request may use it."""
        if self._closed:
            connection.close()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def expire(self) -> None:
        """Close what has been idle too long to be used."""
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_S
        for connection in [one for one in self._idle if one.idle_since < oldest]:
            self._idle.remove(connection)
            connection.close()

    def forget(self, connection: Connection) -> None:
        """It is lost."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close what is idle, and what will be."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
