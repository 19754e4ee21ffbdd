"""A gateway in this process, raw upstreams that fail to order, and a raw client that sees chunk boundaries."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import uvicorn

from laguna_serve.serving.gateway.addresses import open_listeners
from laguna_serve.serving.gateway.admin.services import find_services
from laguna_serve.serving.gateway.app import create_app
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.run import make_admin_settings, make_settings
from laguna_serve.serving.gateway.server import GatewayServer
from laguna_serve.serving.gateway.telemetry.access_log import AccessLog

Handler = Callable[["Exchange"], Awaitable[None]]
NOBODY = "http://127.0.0.1:9"
SSE = "content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"


@dataclass
class Exchange:
    """One request at an upstream, and its connection."""

    head: bytes
    body: bytes
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n")[0].decode("latin-1")

    async def start(self, headers: str, status: str = "200 OK") -> None:
        self.writer.write(f"HTTP/1.1 {status}\r\n{headers}\r\n".encode())
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def answer(
        self, data: bytes, headers: str = "content-type: application/json\r\n", status: str = "200 OK"
    ) -> None:
        await self.start(f"{headers}content-length: {len(data)}\r\n", status)
        self.writer.write(data)
        await self.writer.drain()

    def abort(self) -> None:
        self.writer.transport.abort()


@dataclass
class Upstream:
    """An HTTP server in a thread; `handlers` by path, /health answers 200. `gone` notes when clients left early.

    `seen` has what was relayed; questions for its weights' version, or whether it is paused, come whenever the gateway
    likes: `checks`.
    """

    handlers: dict[str, Handler] = field(default_factory=dict)
    healthy: bool = True
    seen: list[Exchange] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    checks: list[Exchange] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Upstream:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(started),), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        started.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._exchange(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(v) for k, v in read_headers(head) if k == "content-length"), 0)
        exchange = Exchange(head, await reader.readexactly(length), writer, reader)
        path = exchange.line.split(" ")[1].partition("?")[0]
        if path == "/health":
            await exchange.answer(b"", status="200 OK" if self.healthy else "503 Service Unavailable")
            return
        if path in ("/weight_info", "/is_paused"):
            self.checks.append(exchange)
            if path not in self.handlers:
                await exchange.answer(b"", status="404 Not Found")
                return
        else:
            self.seen.append(exchange)
        watch = asyncio.create_task(reader.read(1))
        work = asyncio.create_task(self._handle(exchange, path))  # type: ignore[arg-type]
        await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.gone.append(time.monotonic())
            work.cancel()
            raise ConnectionResetError
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await work

    async def _handle(self, exchange: Exchange, path: str) -> None:
        await self.handlers.get(path, echo)(exchange)


async def echo(exchange: Exchange) -> None:
    """Everything about the request, as JSON."""
    found = {"line": exchange.line, "headers": read_headers(exchange.head), "body": exchange.body.decode("latin-1")}
    await exchange.answer(json.dumps(found).encode())


def read_headers(head: bytes) -> list[tuple[str, str]]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return [(k.lower(), v.strip()) for k, _, v in (line.partition(":") for line in lines if line)]


@contextlib.contextmanager
def gateway(
    *upstreams: Upstream,
    limits: dict[str, Any] | None = None,
    asgi: bool | type = False,
    models: list[dict[str, Any]] | None = None,
    **tables: Any,
) -> Iterator[Gateway]:
    """A gateway for the model "m" in front of upstreams a, b, …; ready when all of them are.

    `models` are instead of "m".

    `asgi`: its application under uvicorn's own protocol, as any ASGI server would run it, or under the one that is
    given.
    """
    model = {"name": "m", **tables.pop("model", {})}
    each = tables.pop("upstream", {})
    model["upstreams"] = [{"name": chr(97 + i), "url": u.url, **each} for i, u in enumerate(upstreams)]
    more = [{"name": name, "upstreams": [{"name": f"{name}-a", "url": NOBODY}]} for name in tables.pop("others", ())]
    tables["server"] = {"port": 0, **tables.get("server", {})}
    listed = [model, *more] if models is None else models
    config = parse_config({"models": listed, "limits": limits or {}, **tables}, "test")
    with open_listeners(config) as listeners:
        config, log = listeners.config, io.StringIO()
        app = create_app(config, AccessLog(log))
        ready = threading.Event()
        http = asgi if isinstance(asgi, type) else "httptools"
        plain = uvicorn.Config(
            app, http=http, log_level="critical", ws="none", server_header=False, proxy_headers=False
        )
        settings = plain if asgi else make_settings(app, config)
        server = GatewayServer(app, settings, make_admin_settings(app, config), listeners.admin, ready.set)
        thread = threading.Thread(target=server.run, args=(listeners.server,), daemon=True)
        thread.start()
        assert ready.wait(10)
        found = Gateway(config.server.port, server, app, log, config.admin.port)
        deadline = time.monotonic() + 5
        while any(e.healthy is None for p in found.relay.pools.values() for e in p.engines):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield found
        finally:
            server.should_exit = server.force_exit = True
            server.wake()
            thread.join(10)
            assert not thread.is_alive()


@dataclass
class Gateway:
    """A gateway that listens on `port`."""

    port: int
    server: GatewayServer
    app: Any
    log: io.StringIO
    admin_port: int

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return find_services(self.app).session._loop

    @property
    def relay(self) -> Any:
        return find_services(self.app).relay

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_idle(self, timeout_s: float = 5.0) -> None:
        """Until no request, slot or waiter is left."""
        deadline = time.monotonic() + timeout_s
        while self.busy():
            assert time.monotonic() < deadline, self.busy()
            time.sleep(0.005)

    def busy(self) -> list[int]:
        pools = self.relay.pools.values()
        counts = [
            len(self.relay.exchanges),
            *(p.queued for p in pools),
            *(e.in_flight for p in pools for e in p.engines),
        ]
        return counts if any(counts) else []

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, path: str, body: bytes | None = None, headers: str = "", method: str = "") -> Reply:
        """One request on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(make_request(path, body, headers, method))
            return read_reply(connection)

    def ask_admin(self, path: str, body: Any = None, headers: str = "", host: str = "127.0.0.1") -> Reply:
        """One request to the admin port; `body` is sent as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = make_request(path, data, f"content-type: application/json\r\n{headers}")
        with socket.create_connection(("127.0.0.1", self.admin_port), timeout=10) as connection:
            connection.sendall(request.replace(b"host: x", b"host: " + host.encode()))
            return read_reply(connection)


def make_request(path: str, body: bytes | None = None, headers: str = "", method: str = "") -> bytes:
    method = method or ("GET" if body is None else "POST")
    length = f"content-length: {len(body)}\r\n" if body is not None else ""
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{length}{headers}\r\n".encode("latin-1") + (body or b"")


@dataclass
class Reply:
    """`chunks` as they were framed; one for a body with a length. `cut`: the connection ended too early."""

    status: int
    headers: list[tuple[str, str]]
    chunks: list[bytes]
    cut: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


def read_reply(connection: socket.socket, file: BinaryIO | None = None) -> Reply:
    """Read one answer; of several on one connection, all from one `file`."""
    file = file or connection.makefile("rb")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        if not line:
            return Reply(0, [], [], cut=True)
        head += line
    reply = Reply(int(head.split(b" ")[1]), read_headers(head), [])
    if reply.header("transfer-encoding") == "chunked":
        while True:
            size = file.readline()
            if not size:
                reply.cut = True
                return reply
            data = file.read(int(size, 16))
            file.read(2)
            if not data:
                return reply
            reply.chunks.append(data)
    length = int(reply.header("content-length") or 0)
    reply.chunks.append(file.read(length))
    reply.cut = len(reply.body) < length
    return reply


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
