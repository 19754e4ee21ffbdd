"""An HTTP/1.1 client for the relay: what an engine sends is handed on in the call in which it arrives.

On httptools' parser (llhttp, as in uvicorn and Node.js). A general client puts a queue and a task switch between the
socket and its reader; per event of a stream those cost more than all the rest (bench/gateway.py).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import select
import socket
import struct
import termios
import time
from typing import NamedTuple, Protocol, cast

import httptools

from laguna_serve.serving.gateway.wire.failures import BrokenError, SilentError, StaleError, StalledError

# A host that vanished without a word is found by the kernel, as an answer may take any time to begin.
TCP_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
CLOSED = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", select.POLLIN)
MOST_HEAD_BYTES = 1 << 20
logger = logging.getLogger(__name__)


class Waits(NamedTuple):
    """How long an engine may be silent: before the first byte of a body (None: for ever), and between two.

    A client may take nothing for as long as the latter.
    """

    first_s: float | None = None
    between_s: float = 300.0

    @property
    def shortest(self) -> float:
        """When to look for the first time: the shorter of the two."""
        return self.between_s if self.first_s is None else min(self.first_s, self.between_s)


class Receiver(Protocol):
    """Receives an answer. After `on_end` or `on_error` nothing more comes."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status and headers, names in lower case."""

    def on_data(self, data: bytes) -> None:
        """Take a piece of the body, freed of its framing: a chunk, or the part of one that has arrived."""

    def on_pause(self) -> None:
        """All that has arrived by now was passed on."""

    def on_end(self) -> None:
        """Note that the answer is complete."""

    def on_error(self, error: OSError) -> None:
        """BrokenError, SilentError or StalledError: there will be no more of it."""


class Keeper(Protocol):
    """Whose connections they are. While `silence_allowed` (the engine is paused) no answer is given up for it."""

    silence_allowed: bool

    def keep(self, connection: Connection) -> None:
        """Its answer is complete; the next request may use it."""

    def forget(self, connection: Connection) -> None:
        """Its end has come, idle or not: it is not used again."""


class Connection(asyncio.Protocol):
    """One connection to an engine; one request at a time."""

    def __init__(self, origin: Keeper) -> None:
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        # Outlives an answer: setting and cancelling one per request costs more than looking in vain now and then.
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._waits = Waits()
        self.idle_since = self.received_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes: int | None = 0
        self._bodiless = self._framed = self._paused = False
        self._active_s = 0.0
        self._begun = self._unanswered = self._unread = False

    def request(self, data: bytes, receiver: Receiver, waits: Waits, *, bodiless: bool) -> None:
        """Send a whole request, framed; `receiver` gets its answer.

        `bodiless`: the answer will have no body, whatever its headers say (HEAD).
        """
        assert self._receiver is None
        self._reset()
        self._receiver, self._bodiless, self._waits = receiver, bodiless, waits
        if self._transport is None:
            # It was lost since it was taken.
            self._loop.call_soon(self._fail, StaleError("connection lost"))
        else:
            self._unanswered = self.kept
            self._transport.write(data)
        self._active_s = self._loop.time()
        due_s = self._active_s + waits.shortest
        if self._timer is None or due_s < self._due_s:
            self._look_at(due_s)

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and not self._paused:
            self._paused, self._active_s = True, self._loop.time()
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused:
            self._paused, self._active_s = False, self._loop.time()
            self._transport.resume_reading()

    def abort(self) -> None:
        """Leave in the middle: the engine aborts its work. The receiver is not called."""
        self._release()
        self.close()

    def close(self) -> None:
        self._look_no_more()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    @property
    def kept(self) -> bool:
        """It has had a request before."""
        return self.idle_since > 0

    def is_usable(self) -> bool:
        """Say whether it is open; an end that has arrived is seen though the event loop has not come to it."""
        return self._transport is not None and not self._poll.poll(0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._socket = transport.get_extra_info("socket")
        if self._socket is not None:
            self._poll.register(self._socket.fileno(), CLOSED)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_KEEPALIVE:
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def eof_received(self) -> None:
        """Note that the engine sends no more. What it had not received when it closed, it never will."""
        self._unread = self._unanswered and self._has_unreceived()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the engine has closed, or died."""
        self._look_no_more()
        self._transport = None
        self._parser = None  # else the two would keep each other until the garbage collector comes
        self._origin.forget(self)
        if self._receiver is not None and self._head_bytes is None and not self._framed and exc is None:
            self._complete()  # a body that ends where the connection does
        elif self._unanswered and (self._unread or isinstance(exc, BrokenPipeError)):
            self._fail(StaleError("connection closed before the request"))
        else:
            self._fail(BrokenError("connection lost"))

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer: all that is in them is handed on before this returns."""
        if self._receiver is None or self._parser is None:
            self.close()  # nothing was asked
            return
        self._active_s, self.received_s = self._loop.time(), time.perf_counter()
        self._unanswered = False
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
        if self._head_bytes is None:
            return  # what a body trails is not passed on, nor kept: there may be any number of it
        name = name.lower()
        self._headers.append((name, value))
        self._framed = self._framed or name == b"content-length" or name == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        assert self._parser is not None
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
        if self._receiver is not None:
            self._begun = True
            self._receiver.on_data(data)

    def on_message_complete(self) -> None:
        if self._head_bytes is not None:
            self._headers = []
        elif self._receiver is not None:
            self._complete(reusable=self._parser is not None and self._is_reusable(self._parser))

    def _is_reusable(self, parser: httptools.HttpResponseParser) -> bool:
        """Whether the server keeps the connection; behind the 500 of an exception uvicorn closes it without a word."""
        return self._framed and parser.should_keep_alive() and parser.get_status_code() != 500

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
        receiver, self._receiver = self._receiver, None
        return receiver

    def _has_unreceived(self) -> bool:
        """Has the engine's kernel acknowledged less than was sent? With its FIN it tells all that it has."""
        if self._transport is None or self._socket is None:
            return False
        size = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return size > 0 or self._transport.get_write_buffer_size() > 0

    def _look_at(self, due_s: float) -> None:
        self._look_no_more()
        self._due_s, self._timer = due_s, self._loop.call_at(due_s, self._check_silence)

    def _look_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_silence(self) -> None:
        """One timer for all of a connection's answers, moved on instead of set anew with every chunk."""
        self._timer = None
        if self._receiver is None:
            return
        if self._origin.silence_allowed:
            self._active_s = self._loop.time()
        limit = self._waits.between_s if self._begun or self._paused else self._waits.first_s
        left = self._waits.shortest if limit is None else self._active_s + limit - self._loop.time()
        if left > 0:
            self._look_at(self._loop.time() + left)
        else:
            self.close()
            self._fail(StalledError("stalled") if self._paused else SilentError("silent"))
