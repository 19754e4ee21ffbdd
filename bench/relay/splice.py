"""The least that a relay can add: bytes from one socket to the other, unread, on the event loop that our gateway has.

Its own process beside the relays that bench/gateway.py compares: what it adds is the machine's, not the gateway's.
    python -m laguna_serve.bench.relay.splice PORT ENGINE_PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

from laguna_serve.bench.relay.mock_engine import BACKLOG


class _Half(asyncio.Protocol):
    """One of the two connections of a client; what comes is written to the other."""

    def __init__(self) -> None:
        self.other: _Half | None = None
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []

    def join(self, other: _Half) -> None:
        """Both are there from now on."""
        self.other, other.other = other, self
        for data in self._early:
            other.write(data)
        if self._transport is None:
            other.close()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.other is not None:
            self.other.close()


async def serve(port: int, engine_port: int) -> None:
    """Listen on the loopback until the process is killed."""
    loop = asyncio.get_running_loop()
    joining = set[asyncio.Task[None]]()

    async def join(client: _Half) -> None:
        _, engine = await loop.create_connection(_Half, "127.0.0.1", engine_port)
        client.join(engine)

    def accept() -> _Half:
        client = _Half()
        task = loop.create_task(join(client))
        joining.add(task)
        task.add_done_callback(joining.discard)
        return client

    server = await loop.create_server(accept, "127.0.0.1", port, backlog=BACKLOG)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
