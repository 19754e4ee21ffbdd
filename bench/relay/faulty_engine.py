"""A mock engine that fails to order, for the soak of the gateway.

The request's body says how it is to be answered: "mode" is whole, stream, kill, truncate, garbage, reset or slow.
Streams are EVENTS numbered events. It has vLLM's routes for weights. Its own process:
python -m laguna_serve.bench.relay.faulty_engine PORT
"""

from __future__ import annotations

import asyncio
import re
import sys

import uvloop

from laguna_serve.bench.relay.mock_engine import HEAD, StreamEngine

EVENTS = 8
GAP_S, SLOW_GAP_S = 0.001, 0.05
MODE = re.compile(rb'"mode": "(\w+)"')
VERSION = re.compile(rb'"weight_version": "([^"]+)"')
DONE = b"data: [DONE]\n\n"


class SoakEngine(StreamEngine):
    """One connection to an engine whose faults the requests' bodies choose."""

    version = b"default"

    def __init__(self) -> None:
        super().__init__(EVENTS, GAP_S)
        self._url = self._body = b""

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        """Answer a whole request: as its body's mode says, or with the version of the weights."""
        assert self._transport is not None
        if not self._url.startswith(b"/v1/completions"):
            if version := VERSION.search(self._body):
                SoakEngine.version = version[1]
            self._whole(b'{"weight_version": "%s"}' % SoakEngine.version)
            return
        match = MODE.search(self._body)
        mode = match[1].decode() if match else "whole"
        if mode == "whole":
            self._whole(
                b'{"version": "%s", "usage": {"prompt_tokens": 3, "completion_tokens": 8}}' % SoakEngine.version
            )
        elif mode == "reset":
            self._transport.abort()
        else:
            self._transport.write(HEAD)
            self._send_event(0, mode)

    def _whole(self, body: bytes) -> None:
        assert self._transport is not None
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _send_event(self, index: int, mode: str) -> None:
        if self._transport is None:
            return
        event = b'data: {"event": %d}\n\n' % index
        if index == EVENTS // 2 and mode in ("kill", "truncate", "garbage"):
            wrong = {"kill": b"", "truncate": b"ff\r\n" + event, "garbage": b"\x00 no chunk\r\n"}[mode]
            self._transport.write(wrong)
            self._transport.close()
            return
        self._transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        if index + 1 < EVENTS:
            gap = SLOW_GAP_S if mode == "slow" else GAP_S
            self._timer = asyncio.get_running_loop().call_later(gap, self._send_event, index + 1, mode)
        else:
            self._transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(DONE), DONE))


async def serve(port: int) -> None:
    """Listen on the loopback until the process is killed."""
    server = await asyncio.get_running_loop().create_server(SoakEngine, "127.0.0.1", port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
