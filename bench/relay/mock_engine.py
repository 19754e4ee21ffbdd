"""A fast mock engine: streams of server-sent events that carry the time at which each was sent.

Its own process, so that it costs the client nothing: python -m laguna_serve.bench.relay.mock_engine PORT CHUNKS GAP_MS
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import httptools
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
# Connections that come at once; one too many is tried again a second later.
BACKLOG = 4096
# A chat completion's chunk. The time is in its text, where a relay that writes every event anew leaves it.
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"fake",'
    b'"choices":[{"index":0,"delta":{"content":"ns%d "},"finish_reason":null}]}\n\n'
)


class StreamEngine(asyncio.Protocol):
    """One connection: every POST is answered by a stream, everything else by an empty object."""

    def __init__(self, chunks: int, gap_s: float) -> None:
        self._chunks, self._gap_s = chunks, gap_s
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream of a client that has left."""
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer a whole request: a POST with a stream of events, anything else with an empty body."""
        assert self._transport is not None
        if self._parser.get_method() != b"POST":
            self._transport.write(EMPTY)
            return
        self._transport.write(HEAD)
        self._send(self._chunks)

    def _send(self, left: int) -> None:
        if self._transport is None:
            return
        event = EVENT % time.monotonic_ns()
        self._transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        if left > 1:
            self._timer = asyncio.get_running_loop().call_later(self._gap_s, self._send, left - 1)
        else:
            self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def serve(port: int, chunks: int, gap_s: float) -> None:
    """Listen on the loopback until the process is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: StreamEngine(chunks, gap_s), "127.0.0.1", port, backlog=BACKLOG)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000))
