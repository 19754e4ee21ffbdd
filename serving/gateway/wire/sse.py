"""Event streams on their way: clients get whole events only, and a broken stream ends in its API's own error events.

An event ends in a blank line: two line ends, each LF, CRLF or CR (https://html.spec.whatwg.org/multipage/
server-sent-events.html). What follows the last one is held back, as no client can use it before the rest has come, and
is dropped if the engine breaks; SDKs would parse a half event as a whole one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping

from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.kit.results import JsonObject

# Of one event. What is longer passes in pieces, so that nothing is buffered without limit.
MAX_HELD_BYTES = 1 << 20
# So many pieces of a stream are searched for the response that it is about; OpenAI and vLLM tell in the first event.
FIRST_READS = 8
RESPONSES = "/v1/responses"
SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d+)')


def find_end(data: bytes | bytearray, start: int = 0) -> int:
    """Where the last whole event ends, behind its blank line; 0 if none does. `start`: nothing ends before it."""
    last = max(data.rfind(b"\n\n", start), data.rfind(b"\n\r", start), data.rfind(b"\r\r", start))
    if last < 0:
        return 0
    end = last + 2
    return end + 1 if data[end - 1 : end + 1] == b"\r\n" else end


class EventStream:
    """The events of one answer. While `passes`, data that ends in a blank line needs no call of `take`."""

    def __init__(self) -> None:
        self.passes = True
        self._held = bytearray()
        # A part of an event was handed on: it was too long to be held.
        self.broken_open = False

    def take(self, data: bytes) -> bytes:
        """Take what can be handed on now, after `data` has come."""
        if self.broken_open:
            return self._take_rest(data)
        if before := len(self._held):
            self._held += data
            end = find_end(self._held, before - 1)
            passed = bytes(self._held[:end])
            del self._held[:end]
        else:  # a blank line came before: one line end more is a blank line too
            end = max(0, find_end(b"\n" + data) - 1)
            passed, self._held = data[:end], bytearray(data[end:])
        if len(self._held) > MAX_HELD_BYTES:
            self.broken_open = True
            passed += self.end()
        self.passes = not self._held and not self.broken_open
        return passed

    def end(self) -> bytes:
        """Take the rest of a stream that ended as it should, though no blank line ends it."""
        rest = bytes(self._held)
        self._held.clear()
        return rest

    def render_error(self, error: GatewayError, path: str) -> bytes:
        """Render the events that end a broken stream."""
        return error.event(path)

    def _take_rest(self, data: bytes) -> bytes:
        """Of an event that is longer than what is held, the end may stand across two pieces: its last byte is kept."""
        data = bytes(self._held) + data
        self._held.clear()
        if (end := find_end(data)) == 0:
            self._held += data[-1:]
            return data[:-1]
        self.broken_open = False
        return data[:end] + self.take(data[end:])


class ResponseStream(EventStream):
    """A stream of /v1/responses.

    It ends as OpenAI's does, in `error` and then `response.failed`: the SDKs raise for the first, Codex waits for the
    second. Both go on with the stream's sequence numbers, and the failed response is the one of its first event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes = False
        self._response: JsonObject | None = None
        self._unread = FIRST_READS
        self._sequence = -1

    def take(self, data: bytes) -> bytes:
        """As of any stream, with an eye on what its end will need."""
        passed = super().take(data)
        self.passes = False
        if self._unread:
            self._response = _read_response(passed)
            self._unread = 0 if self._response is not None else self._unread - bool(passed)
        if numbers := SEQUENCE.findall(passed):
            self._sequence = int(numbers[-1])
        return passed

    def render_error(self, error: GatewayError, path: str) -> bytes:
        """Render the two last events, `error` and `response.failed`."""
        response = self._response or {"id": "resp_unknown", "object": "response", "created_at": int(time.time())}
        code = error.code if error.code == "rate_limit_exceeded" else "server_error"
        about = {"code": code, "message": error.message}
        first: JsonObject = {"type": "error", **about, "param": None, "sequence_number": self._sequence + 1}
        first["error"] = {"type": error.kind, **about, "param": None}
        last: JsonObject = {"type": "response.failed", "sequence_number": self._sequence + 2}
        last["response"] = {"output": [], **response, "status": "failed", "error": about}
        return _render(first) + _render(last)


def frame_events(
    path: str, headers: list[tuple[bytes, bytes]], named: Mapping[bytes, bytes]
) -> tuple[EventStream | None, list[tuple[bytes, bytes]]]:
    """For a streamed answer to a request for `path`: its events, and the headers without a length.

    `headers` have names in lower case. There is no room for an error behind a length. None for a stream that is
    compressed, which passes as it is: if it breaks, the connection must be cut.
    """
    if named.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        return None, headers
    events = ResponseStream() if path.startswith(RESPONSES) else EventStream()
    if b"content-length" in named:
        headers = [(name, value) for name, value in headers if name != b"content-length"]
    return events, headers


def _render(event: JsonObject) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _read_response(events: bytes) -> JsonObject | None:
    """Read the response that the first event with one tells of."""
    for line in re.split(rb"\r\n|\n|\r", events):
        if line.startswith(b"data:"):
            try:
                found = json.loads(line[5:])["response"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    return None
