"""The client of the gateway's benchmark: many streams at once, each event's way through measured to the microsecond.

A bare protocol on uvloop: what the client costs is the same on every path, and little.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass, field
from typing import cast

import uvloop

SENT = re.compile(rb'"ns(\d+) "')
SETTLE_S = 0.1
# A stream that has not ended by then has failed.
STREAM_S = 60.0
END = b"0\r\n\r\n"
BODY = b'{"model":"fake","stream":true,"messages":[{"role":"user","content":"' + b"word " * 200 + b'"}]}'


@dataclass(slots=True)
class Sample:
    """What one round saw, in ms.

    Per stream from the request to its first event, and the mean gap between two events; per event from sent to
    received.
    """

    ttft_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    errors: int = 0
    wall_s: float = 0.0


class _Stream(asyncio.Protocol):
    """One connection, used again and again."""

    def __init__(self, request: bytes, sample: Sample) -> None:
        self._request, self.sample = request, sample
        self._transport: asyncio.Transport | None = None
        self._started_ns = self._first_ns = self._events = 0
        self._done: asyncio.Future[bool] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        for sent in SENT.findall(data):
            if not self._events:
                self._first_ns = now
                self.sample.ttft_ms.append((now - self._started_ns) / 1e6)
            self._events += 1
            self.sample.chunk_ms.append((now - int(sent)) / 1e6)
        if data.endswith(END) and self._done is not None and not self._done.done():
            if self._events > 1:
                self.sample.gap_ms.append((now - self._first_ns) / (self._events - 1) / 1e6)
            self._done.set_result(self._events > 0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_result(False)

    async def ask(self) -> bool:
        """Send the request; True when its stream came to its end, False also where that takes too long."""
        if self._transport is None:
            return False
        self._events, self._started_ns = 0, time.monotonic_ns()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        try:
            return await asyncio.wait_for(self._done, STREAM_S)
        except TimeoutError:
            return False

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def run_round(host: str, port: int, streams: int, requests: int, key: str, spread_s: float) -> Sample:
    """Send `requests` streams, `streams` at once, each connection kept; the first of each begin within `spread_s`."""
    return uvloop.run(_run(host, port, streams, requests, key, spread_s))


async def _run(host: str, port: int, streams: int, requests: int, key: str, spread_s: float) -> Sample:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
    )
    request = head.encode() + BODY
    sample, left = Sample(), requests
    loop = asyncio.get_running_loop()

    async def connect() -> _Stream:
        _, made = await loop.create_connection(lambda: _Stream(request, sample), host, port)
        return made

    async def work(stream: _Stream, wait_s: float) -> None:
        nonlocal left
        await asyncio.sleep(wait_s)
        while left > 0:
            left -= 1
            if not await stream.ask():
                sample.errors += 1
                stream.close()
                stream = await connect()
        stream.close()

    connected = await asyncio.gather(*(connect() for _ in range(streams)))
    await asyncio.sleep(SETTLE_S)  # until they are accepted, which is none of a request's time
    started = time.monotonic()
    rng = random.Random(streams)  # the same moments on every path
    await asyncio.gather(*(work(stream, rng.uniform(0, spread_s)) for stream in connected))
    sample.wall_s = time.monotonic() - started
    return sample
