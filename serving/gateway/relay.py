"""Takes requests and sends them on their way: who may ask, which model, which engine. What a request needs is parsed
once, and of its body only `model` is read.

An ASGI application, for any server; under the gateway's own (protocol.py) requests do not come this way but straight
to `begin`, which saves a task and several switches per chunk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from laguna_serve.serving.gateway import errors, open_files
from laguna_serve.serving.gateway.access import Access, Holder
from laguna_serve.serving.gateway.access_log import AccessLog
from laguna_serve.serving.gateway.backlog import Backlog
from laguna_serve.serving.gateway.client_address import Proxies
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.cors import Cors
from laguna_serve.serving.gateway.errors import GatewayError
from laguna_serve.serving.gateway.exchange import Exchange, Sink
from laguna_serve.serving.gateway.headers import Head, Headers, check_path, read_head
from laguna_serve.serving.gateway.journal import Journal
from laguna_serve.serving.gateway.metrics import Metrics
from laguna_serve.serving.gateway.pool import Pool
from laguna_serve.serving.gateway.shadow import Shadows

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MODELS = "/v1/models"
SESSION_HEADER = b"x-session-id"
PREFIX_BYTES = 512
# Chunks that an ASGI server has not taken yet, before the engine is read no further.
MOST_PENDING = 64
# Of a request that needs no key.
MAX_OPTIONS_BYTES = 64 << 10
logger = logging.getLogger(__name__)


class _Envelope(msgspec.Struct):
    """What routing needs of a body; everything else is skipped, not decoded."""

    model: str | None = None


class Relay:
    """All requests of a gateway, and the pools that they go to."""

    def __init__(self, config: Config, metrics: Metrics, shadows: Shadows, log: AccessLog) -> None:
        self.pools: dict[str, Pool] = {}
        self.access = Access()
        self.draining = False
        self.backlog = Backlog(config.limits.max_queued_bytes)
        metrics.backlog = self.backlog
        self.exchanges: set[Exchange] = set()
        self._metrics = metrics
        self._shadows = shadows
        self.journal = Journal(metrics, log)
        self.last_errors = self.journal.last_errors
        self._created = int(time.time())
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take a configuration, at the start or in between. Requests in flight and in queues go on where they are.
        Whatever can fail is made before anything is replaced."""
        pools = {model.name: self.pools.get(model.name) or Pool(model, config.limits) for model in config.models}
        engines = {model.name: pools[model.name].plan(model) for model in config.models}
        cors, proxies = Cors(config.server.allowed_origins), Proxies(config.server.trusted_proxies)
        limit = open_files.find_limit()
        open_files.warn_if_low(config, limit)

        self.config = config
        for model in config.models:
            pools[model.name].configure(model, config.limits, engines[model.name])
        for name in self.pools.keys() - pools.keys():
            self.pools[name].remove()
        self.pools = pools
        self._metrics.pools = pools
        self.access.configure(config.keys)
        self.cors, self._proxies = cors if cors.enabled else None, proxies
        self.backlog.most = config.limits.max_queued_bytes
        self.max_connections = open_files.find_max_connections(config, limit)

    def close(self) -> None:
        """End what is still in flight, and the connections to the engines."""
        for exchange in list(self.exchanges):
            exchange.fail(errors.stopped())
        for pool in self.pools.values():
            pool.close()
        self.journal.flush()

    def begin(self, head: Head, sink: Sink) -> Exchange:
        """Take a request whose body is still to come; it may have been refused, and finished, already."""
        holder: Holder | None = None
        refusal: GatewayError | None = None
        # Browsers send preflights without a key.
        is_options = head.method == "OPTIONS"
        try:
            if self.draining:
                raise errors.draining()
            if not is_options:
                holder = self.access.enter(head.named)
            check_path(head, self.config.server.more_paths)
            announced = head.named.get(b"content-length")
            if announced is not None and announced.isdigit():
                self.check_size(int(announced), is_options=is_options)
                self.backlog.check(int(announced))
        except GatewayError as error:
            refusal = error
        exchange = Exchange(head, sink, holder, self._finish)
        exchange.cors, exchange.backlog, exchange.keys_are_ours = self.cors, self.backlog, self.access.enabled
        exchange.client, exchange.forwarded_for = self._proxies.find_client(head)
        self.exchanges.add(exchange)
        if refusal is not None:
            exchange.fail(refusal)
        elif self.cors is not None and is_options and (answer := self.cors.answer_preflight(head)) is not None:
            exchange.reply(*answer)
        return exchange

    def check_size(self, size: int, *, is_options: bool = False) -> None:
        """A body of so many bytes so far. Raises GatewayError: 413 it is more than the gateway takes."""
        most = min(self.config.server.max_body_bytes, self.config.limits.max_queued_bytes)
        most = min(most, MAX_OPTIONS_BYTES) if is_options else most
        if size > most:
            raise errors.body_too_large(most)

    def hold(self, exchange: Exchange, size: int) -> None:
        """Of a request's body there are so many bytes by now. Raises GatewayError: 413, or 429 they are too many
        together with all that wait."""
        self.check_size(size, is_options=exchange.head.method == "OPTIONS")
        self.backlog.hold(exchange, size)

    def send(self, exchange: Exchange, body: bytes) -> None:
        """The body is there."""
        if exchange.finished:
            return
        try:
            if exchange.head.path == MODELS and len(self.pools) > 1:
                exchange.reply(200, [(b"content-type", b"application/json")], self._list_models())
                return
            pool = self._find_pool(body)
            if pool.model.shadows:
                self._shadows.accompany(pool.model, exchange, body)
            exchange.send(pool, body, _find_affinity(pool, exchange.head, body, exchange.key))
        except GatewayError as error:
            exchange.fail(error)
        except Exception:
            logger.exception("request %s", exchange.head.request_id.decode())
            exchange.fail(errors.failed())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of any ASGI server."""
        raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        peer = scope["client"][0] if scope.get("client") else ""
        head = read_head(scope["method"], scope["path"], raw_path, scope["query_string"], scope["headers"], peer)
        sink = _AsgiSink()
        sink.exchange = exchange = self.begin(head, sink)
        reader = asyncio.create_task(self._feed(exchange, sink, receive))
        try:
            await sink.drain(send)
        finally:
            exchange.leave()
            reader.cancel()

    async def _feed(self, exchange: Exchange, sink: _AsgiSink, receive: Receive) -> None:
        """The body to the exchange, then watch for the client's going."""
        try:
            async with asyncio.timeout(self.config.server.body_timeout_s):
                body = await self._read_body(exchange, receive)
            self.send(exchange, body)
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

    async def _read_body(self, exchange: Exchange, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            self.hold(exchange, len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _find_pool(self, body: bytes) -> Pool:
        """By the body's `model`; what names none goes to the only model, or to the first."""
        name = None
        if body:
            try:
                name = msgspec.json.decode(body, type=_Envelope).model
            except (msgspec.DecodeError, UnicodeDecodeError):
                name = None  # the engine says what is wrong with it, in its own words
        if name is None:
            return next(iter(self.pools.values()))
        if (pool := self.pools.get(name)) is None:
            raise errors.unknown_model(name[:128])
        return pool

    def _list_models(self) -> bytes:
        """Of several models, where no engine knows all."""
        about = {"object": "model", "created": self._created, "owned_by": "laguna"}
        return msgspec.json.encode({"object": "list", "data": [{"id": name, **about} for name in self.pools]})

    def _finish(self, exchange: Exchange) -> None:
        self.exchanges.discard(exchange)
        self.access.leave(exchange.key)
        self.journal.note(exchange)


class _AsgiSink:
    """Keeps what is to be sent until an ASGI server takes it; with too much of that the engine is read no further."""

    exchange: Exchange | None = None

    def __init__(self) -> None:
        self._messages: deque[Message | None] = deque()
        self._ready = asyncio.Event()

    def start(self, status: int, headers: Headers) -> None:
        self._put({"type": "http.response.start", "status": status, "headers": list(headers)})

    def write(self, data: bytes) -> None:
        self._put({"type": "http.response.body", "body": data, "more_body": True})
        if len(self._messages) > MOST_PENDING and self.exchange is not None:
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


def _find_affinity(pool: Pool, head: Head, body: bytes, holder: Holder | None) -> bytes | None:
    kind = pool.model.affinity
    if kind == "session":
        session = head.named.get(SESSION_HEADER)
        return session if session is not None or holder is None else holder.name.encode()
    if kind == "prefix" and body:
        return body[:PREFIX_BYTES]
    return None
