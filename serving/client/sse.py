"""Server-sent events: bytes in any cut, complete `data` payloads out.

Works on bytes, so a UTF-8 character or a line split between two network reads is no special case.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream; the fields `event`,
`id` and `retry` are ignored, as no OpenAI-compatible server gives them a meaning.
"""

from __future__ import annotations

DONE = b"[DONE]"


class SseParser:
    """Feed it network reads in order; it gives back the payloads that each read completed."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the payloads of the events whose closing blank line lies in `chunk`."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CR LF cut in two
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        *ended, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events: list[bytes] = []
        for part in ended:
            self._line += part
            self._end_line(events)
        self._line += rest
        return events

    def _end_line(self, events: list[bytes]) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        elif line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))


def is_comment(chunk: bytes) -> bool:
    """Whether a network read has nothing but comments, as servers and proxies send to keep a connection open."""
    return chunk.startswith(b":") and all(not line or line.startswith(b":") for line in chunk.splitlines())


def list_payloads(body: bytes) -> list[bytes]:
    """List the payloads of a stream's events, of a whole body; of one that is no stream, the body itself."""
    is_stream = body.lstrip().startswith((b"data:", b":", b"event:"))
    return SseParser().feed(body) if is_stream else [body]
