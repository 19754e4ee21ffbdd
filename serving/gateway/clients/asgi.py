"""The relay as an ASGI application, for any server.

Under the gateway's own protocol requests do not come this way but straight to `Relay.begin`, which saves a task and
several switches per chunk.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.relay.sink import can_stay_open
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Head, Headers, read_head

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Chunks that the server has not taken yet, before the engine is read no further.
MAX_PENDING = 64


class RelayApp:
    """The relay under any ASGI server."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        peer = scope["client"][0] if scope.get("client") else ""
        head = read_head(scope["method"], scope["path"], raw_path, scope["query_string"], scope["headers"], peer)
        sink = _AsgiSink(head)
        sink.exchange = exchange = self._relay.begin(head, sink)
        reader = asyncio.create_task(self._feed(exchange, sink, receive))
        try:
            await sink.drain(send)
        finally:
            exchange.leave()
            reader.cancel()

    async def _feed(self, exchange: Exchange, sink: _AsgiSink, receive: Receive) -> None:
        """Feed the body to the exchange, then watch for the client's going."""
        try:
            async with asyncio.timeout(self._relay.config.server.body_timeout_s):
                self._relay.send(exchange, await self._read_body(exchange, sink, receive))
            while (await receive())["type"] != "http.disconnect":
                pass
            exchange.leave()
        except TimeoutError:
            exchange.fail(errors.body_too_slow())
        except GatewayError as error:
            exchange.fail(error)
        except ConnectionError:
            exchange.leave()
        finally:
            sink.leave()

    async def _read_body(self, exchange: Exchange, sink: _AsgiSink, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            if not exchange.finished:  # else it is read to its end, for nobody
                body += message.get("body", b"")
                self._relay.hold(exchange, len(body))
            if not message.get("more_body", False):
                sink.body_is_due = False
                return bytes(body)


class _AsgiSink:
    """Keeps what is to be sent until the server takes it; with too much of that the engine is read no further."""

    exchange: Exchange | None = None

    def __init__(self, head: Head) -> None:
        self._head = head
        self.body_is_due = True
        self._messages: deque[Message | None] = deque()
        self._ready = asyncio.Event()

    def start(self, status: int, headers: Headers) -> None:
        found = list(headers)
        if self.body_is_due and not can_stay_open(self._head):
            found.append((b"connection", b"close"))
        self._put({"type": "http.response.start", "status": status, "headers": found})

    def write(self, data: bytes) -> None:
        self._put({"type": "http.response.body", "body": data, "more_body": True})
        if len(self._messages) > MAX_PENDING and self.exchange is not None:
            self.exchange.pause()

    def end(self) -> None:
        self._put({"type": "http.response.body", "body": b"", "more_body": False})
        self._put(None)

    def flush(self) -> None:
        pass  # nothing is held back

    def cut(self) -> None:
        # The answer stays open-ended: the server sees that, and cuts the connection.
        self._put(None)

    async def drain(self, send: Send) -> None:
        """Hand everything to the server until the end, or until the client has left."""
        exchange = self.exchange
        assert exchange is not None
        while True:
            while self._messages:
                if (message := self._messages.popleft()) is None:
                    return
                await send(message)
                if not self._messages:
                    exchange.resume()
            if exchange.finished:
                return
            self._ready.clear()
            await self._ready.wait()

    def leave(self) -> None:
        """There will be nothing more."""
        self._put(None)

    def _put(self, message: Message | None) -> None:
        self._messages.append(message)
        self._ready.set()
