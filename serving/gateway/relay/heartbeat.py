"""A stream whose model is being loaded: its head and comments go out before there is an answer.

Clients and what stands between would otherwise take the silence for a failure. The status is 200 from the first
comment on, so that an error that comes afterwards is the stream's last event.
"""

from __future__ import annotations

import json

import msgspec

from laguna_serve.serving.gateway.relay.sink import Sink
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Head, Headers
from laguna_serve.serving.gateway.wire.sse import RESPONSES, EventStream, ResponseStream

EVENT_STREAM = b"text/event-stream"
COMMENT = b": the model is being loaded\n\n"
# Of an answer that is no stream, after a head that promised one.
MAX_COLLECTED_BYTES = 1 << 20


class _Streamed(msgspec.Struct):
    stream: bool | None = None


def wants_stream(body: bytes) -> bool:
    """Whether a request's body asks for events."""
    try:
        return msgspec.json.decode(body, type=_Streamed).stream is True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class HeartbeatSink:
    """A client's sink, to which `beat` may write before the answer comes; without a beat it is the client's own."""

    def __init__(self, sink: Sink, head: Head, headers: Headers) -> None:
        self._sink, self._head, self._headers = sink, head, headers
        self._begun = False
        self._status: int | None = None
        self._collected = bytearray()

    def beat(self) -> None:
        """Say that the request still waits."""
        if not self._begun:
            self._begun = True
            first = ((b"content-type", EVENT_STREAM + b"; charset=utf-8"), (b"cache-control", b"no-cache"))
            self._sink.start(200, [*first, *self._headers])
        self._sink.write(COMMENT)
        self._sink.flush()

    def start(self, status: int, headers: Headers) -> None:
        """Start with the answer's head, or, where one is out already, go on after it."""
        if not self._begun:
            self._sink.start(status, headers)
        elif not (status == 200 and dict(headers).get(b"content-type", b"").lower().startswith(EVENT_STREAM)):
            self._status = status

    def write(self, data: bytes) -> None:
        """Write a part of the stream, or keep one of what is none."""
        if self._status is None:
            self._sink.write(data)
        elif len(self._collected) < MAX_COLLECTED_BYTES:
            self._collected += data

    def flush(self) -> None:
        """As the client's sink."""
        if self._status is None:
            self._sink.flush()

    def end(self) -> None:
        """End it, with what was no stream as its last event."""
        if self._status is not None:
            events = ResponseStream() if self._head.path.startswith(RESPONSES) else EventStream()
            self._sink.write(events.render_error(read_error(self._status, bytes(self._collected)), self._head.path))
        self._sink.end()

    def cut(self) -> None:
        """As the client's sink."""
        self._sink.cut()


def read_error(status: int, body: bytes) -> GatewayError:
    """Read the error that an answer has, in any API's form."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else {}
    inner = found.get("error")
    about = inner if isinstance(inner, dict) else found
    kind, message, code, param = (about.get(name) for name in ("type", "message", "code", "param"))
    return GatewayError(
        status,
        kind if isinstance(kind, str) and kind != "error" else "server_error",
        message if isinstance(message, str) else f"The engine answered with status {status} and no stream.",
        code=None if code is None else str(code),
        param=param if isinstance(param, str) else None,
    )
