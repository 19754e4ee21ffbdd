"""Passes a request to an engine and its answer back, byte for byte and chunk by chunk.

A raw ASGI application: on this path nothing is parsed but the request's `model`, and nothing is built per chunk. A
request is sent again, to another engine, only while its engine cannot be reached, so that none runs twice.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.access import Access
from laguna_serve.serving.gateway.access_log import AccessLog
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.errors import GatewayError
from laguna_serve.serving.gateway.metrics import Metrics
from laguna_serve.serving.gateway.pool import Engine, Pool
from laguna_serve.serving.gateway.shadow import Shadows

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of one connection, not of the message: RFC 9110, section 7.6.1. Accept-Encoding goes on, so that bytes stay bytes.
PROXY_HEADERS = (b"proxy-authenticate", b"proxy-authorization", b"proxy-connection")
HOP_BY_HOP = frozenset(
    (*PROXY_HEADERS, b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
KEY_HEADERS = (b"authorization", b"x-api-key")
SESSION_HEADER = b"x-session-id"
PREFIX_BYTES = 512
REQUEST_ID = b"x-request-id"
PLAIN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class _Envelope(msgspec.Struct):
    """What routing needs of a body; everything else is skipped, not decoded."""

    model: str | None = None


class Relay:
    """The ASGI application that relays."""

    def __init__(
        self, config: Config, session: aiohttp.ClientSession, metrics: Metrics, shadows: Shadows, log: AccessLog
    ) -> None:
        self.pools: dict[str, Pool] = {}
        self.access = Access()
        self.draining = False
        self.in_flight = 0
        self._session = session
        self._metrics = metrics
        self._shadows = shadows
        self._log = log
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take a configuration, at the start or in between. Requests in flight and in queues go on where they are."""
        self.config = config
        pools = {model.name: self.pools.get(model.name) or Pool(model, config.limits) for model in config.models}
        for model in config.models:
            pools[model.name].configure(model, config.limits)
        self.pools = pools
        self.access.configure(config.keys)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=config.limits.connect_timeout_s, sock_read=config.limits.silence_timeout_s
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path: str = scope["path"]
        answer = _Answer(send, path, _find_request_id(scope["headers"]))
        self.in_flight += 1
        try:
            async with _cancelled_on_disconnect(receive) as (body_parts, watch):
                await self._handle(scope, answer, body_parts, watch)
        except GatewayError as error:
            await answer.fail(error)
        except _ClientGoneError:
            answer.status = 499
        finally:
            self.in_flight -= 1
            self._metrics.note(path, answer.status, answer.started_s, answer.first_s)
            self._log.write(
                request_id=answer.request_id.decode(),
                method=scope["method"],
                path=path,
                key=answer.key,
                model=answer.model,
                upstream=answer.upstream,
                status=answer.status,
                started_s=answer.started_s,
                first_s=answer.first_s,
            )

    async def _handle(self, scope: Scope, answer: _Answer, receive: Receive, watch: Callable[[], None]) -> None:
        if self.draining:
            raise errors.draining()
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        with self.access.enter(headers) as key:
            answer.key = key
            body = await self._read_body(headers, receive)
            pool = self._find_pool(scope, body)
            answer.model = pool.model.name
            watch()
            with self._shadowed(pool, scope["path"], body, answer):
                await self._send(pool, _find_affinity(pool, headers, body, key), scope, headers, body, answer)

    async def _send(
        self,
        pool: Pool,
        affinity: bytes | None,
        scope: Scope,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        answer: _Answer,
    ) -> None:
        """To an engine of the pool; to the next one only where the first was never reached."""
        tried: set[Engine] = set()
        while True:
            engine = await pool.acquire(affinity, frozenset(tried))
            try:
                await self._exchange(engine, scope, headers, body, answer)
                return
            except aiohttp.ClientConnectorError as error:
                engine.note_failure(f"{type(error).__name__}", time.monotonic())
                tried.add(engine)
                if len(tried) == len(pool.engines):
                    raise errors.engine_lost() from None
            finally:
                pool.release(engine)

    @contextmanager
    def _shadowed(self, pool: Pool, path: str, body: bytes, answer: _Answer) -> Iterator[None]:
        """Copies of the request run beside the block; they are given what it answered."""
        if not pool.model.shadows:
            yield
            return
        started = (
            self._shadows.start(pool.model.name, shadow, path, body, answer.request_id) for shadow in pool.model.shadows
        )
        waiting = [future for future in started if future is not None]
        answer.copy = bytearray() if waiting else None
        try:
            yield
        finally:
            whole = bytes(answer.copy) if answer.copy is not None and answer.complete and answer.status == 200 else None
            for future in waiting:
                if not future.done():
                    future.set_result(whole)

    async def _exchange(
        self, engine: Engine, scope: Scope, headers: list[tuple[bytes, bytes]], body: bytes, answer: _Answer
    ) -> None:
        answer.upstream = engine.config.name
        url = URL(engine.config.url + _find_target(scope), encoded=True)
        try:
            async with self._session.request(
                scope["method"],
                url,
                data=body or None,
                headers=_forward_headers(headers, answer.request_id, keys_are_ours=answer.key is not None),
                timeout=self._timeout,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            ) as response:
                await answer.start(response.status, _answer_headers(response, engine, answer.request_id))
                async for chunk, _ in response.content.iter_chunks():
                    if chunk:
                        await answer.pass_on(chunk)
                await answer.end()
                engine.note_success()
        except aiohttp.ClientConnectorError:
            raise
        except TimeoutError:
            engine.note_failure("silent", time.monotonic())
            raise errors.engine_silent() from None
        except (aiohttp.ClientError, ConnectionError) as error:
            engine.note_failure(f"{type(error).__name__}", time.monotonic())
            raise errors.engine_lost() from None

    async def _read_body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        most = self.config.server.max_body_bytes
        announced = next((value for name, value in headers if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > most:
            raise errors.body_too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.config.server.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise errors.body_too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise errors.body_too_slow() from None

    def _find_pool(self, scope: Scope, body: bytes) -> Pool:
        """By the body's `model`; what names none goes to the only model, or to the first."""
        _check_path(scope)
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


class _ClientGoneError(Exception):
    """The client closed its connection."""


class _Answer:
    """What has been sent to the client so far, and what is known of the request."""

    def __init__(self, send: Send, path: str, request_id: bytes) -> None:
        self._send, self._path, self.request_id = send, path, request_id
        self._streams, self._tail = False, b""
        self.started, self.complete, self.status = False, False, 0
        self.copy: bytearray | None = None
        self.started_s = time.perf_counter()
        self.first_s: float | None = None
        self.key: str | None = None
        self.model: str | None = None
        self.upstream: str | None = None

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, status
        self._streams = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def pass_on(self, chunk: bytes) -> None:
        self._tail = chunk[-2:]
        if self.first_s is None:
            self.first_s = time.perf_counter()
        if self.copy is not None:
            self.copy += chunk
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        self.complete = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: GatewayError) -> None:
        """Say it in the way that is still possible: a whole answer, a last event, or a connection that is cut."""
        if not self.started:
            body = error.body(self._path)
            headers = [*error.headers(), (b"content-length", str(len(body)).encode()), (REQUEST_ID, self.request_id)]
            await self.start(error.status, headers)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif self._streams:
            # A half event is ended first, or the error would be a part of it.
            gap = b"" if self._tail in (b"", b"\n\n") else b"\n\n"
            await self._send({"type": "http.response.body", "body": gap + error.event(self._path), "more_body": False})
        # Else the answer stays open-ended, and the server cuts the connection: a body that is short of its length
        # cannot be mended.


@asynccontextmanager
async def _cancelled_on_disconnect(receive: Receive) -> AsyncIterator[tuple[Receive, Callable[[], None]]]:
    """Yields a `receive` for the body, and a function that watches for the client's going once the body is read.

    The block is then cancelled and `_ClientGoneError` raised; the engine's connection is closed, which aborts its work.
    """
    task = asyncio.current_task()
    assert task is not None
    watcher: asyncio.Task[None] | None = None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def start() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    try:
        yield receive, start
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise _ClientGoneError from None
        raise
    finally:
        if watcher is not None:
            watcher.cancel()


def _check_path(scope: Scope) -> None:
    """A path that could leave the engine's root, or be read differently by two servers, is refused."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    lowered = raw.lower()
    segments = scope["path"].split("/")
    if ".." in segments or "." in segments or b"%2f" in lowered or b"%5c" in lowered or b"\\" in raw or b"//" in raw:
        raise errors.bad_request("path: expected a plain path, got one with dots, doubled or hidden slashes")


def _find_target(scope: Scope) -> str:
    """Path and query as the client wrote them."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (path + b"?" + query if query else path).decode("latin-1")


def _find_affinity(pool: Pool, headers: list[tuple[bytes, bytes]], body: bytes, key: str | None) -> bytes | None:
    kind = pool.model.affinity
    if kind == "session":
        session = next((value for name, value in headers if name == SESSION_HEADER), None)
        return session if session is not None or key is None else key.encode()
    if kind == "prefix" and body:
        return body[:PREFIX_BYTES]
    return None


def _find_request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The client's, where it is a plain word, or a new one."""
    given = next((value for name, value in headers if name == REQUEST_ID), b"")
    return given if PLAIN_ID.fullmatch(given) else uuid.uuid4().hex.encode()


def _forward_headers(headers: list[tuple[bytes, bytes]], request_id: bytes, *, keys_are_ours: bool) -> CIMultiDict[str]:
    """The client's headers for the engine. Those that its Connection header names stay behind, and a key that was for
    the gateway."""
    dropped = {*NOT_FORWARDED, REQUEST_ID, *(KEY_HEADERS if keys_are_ours else ())}
    for name, value in headers:
        if name == b"connection":
            dropped.update(part.strip().lower() for part in value.split(b","))
    kept = CIMultiDict((n.decode("latin-1"), v.decode("latin-1")) for n, v in headers if n not in dropped)
    kept["X-Request-Id"] = request_id.decode()
    return kept


def _answer_headers(response: aiohttp.ClientResponse, engine: Engine, request_id: bytes) -> list[tuple[bytes, bytes]]:
    dropped = {*HOP_BY_HOP, REQUEST_ID}
    found = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in dropped]
    return [*found, (REQUEST_ID, request_id), (b"x-upstream", engine.config.name.encode())]
