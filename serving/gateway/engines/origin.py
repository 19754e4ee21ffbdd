"""An engine's address, and the connections to it that are kept for the next requests."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from laguna_serve.serving.gateway.config.tables import Endpoint
from laguna_serve.serving.gateway.wire.failures import UnreachableError
from laguna_serve.serving.gateway.wire.http1 import Connection, Waits
from laguna_serve.serving.gateway.wire.redirects import Site

# vLLM's HTTP server closes an idle connection after 5 s; reusing one about to be closed fails the request.
KEEPALIVE_S = 3.0


class _Status:
    """Waits for the head of an answer."""

    def __init__(self, status: asyncio.Future[int]) -> None:
        self.status = status

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self.status.done():
            self.status.set_result(status)

    def on_error(self, error: OSError) -> None:
        if not self.status.done():
            self.status.set_exception(error)

    def on_data(self, data: bytes) -> None:
        pass

    def on_pause(self) -> None:
        pass

    def on_end(self) -> None:
        pass


class Origin:
    """An engine's address, and the connections to it that are open and idle.

    While `silence_allowed` (the engine is paused) no answer is given up for it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        # True: the system's authorities, until `configure` says which.
        self._tls: ssl.SSLContext | bool | None = True if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._closed = False
        self.site = Site(parts.netloc.encode(), self._host.lower(), self._port, parts.path.rstrip("/").encode())
        # The header lines that every request to this engine has.
        self.lines = b"host: " + self.site.authority + b"\r\n"
        self.has_credential = self.silence_allowed = False
        self._idle: list[Connection] = []

    def configure(self, endpoint: Endpoint) -> None:
        """Take the credential and the authorities of a configuration that has the same URL."""
        authorization = endpoint.authorization
        self._tls, self.has_credential = endpoint.tls, authorization is not None
        self.lines = b"host: " + self.site.authority + b"\r\n"
        if authorization is not None:
            self.lines += b"authorization: " + authorization.encode() + b"\r\n"

    def take(self) -> Connection | None:
        """Take an idle connection, if there is one."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.idle_since < KEEPALIVE_S and connection.is_usable():
                return connection
            connection.close()
        return None

    async def connect(self, timeout_s: float) -> Connection:
        """Open a new connection. Raises UnreachableError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, made = await loop.create_connection(lambda: Connection(self), self._host, self._port, ssl=self._tls)
        except OSError as error:  # TimeoutError is one
            raise UnreachableError(error, timeout_s) from None
        return made

    async def ask_status(self, path: str, timeout_s: float) -> int:
        """Ask for the status of a GET, on a connection of its own.

        An engine that listens no more may still answer on an old one. Raises UnreachableError, BrokenError,
        TimeoutError.
        """
        async with asyncio.timeout(timeout_s):
            connection = await self.connect(timeout_s)
            found = _Status(asyncio.get_running_loop().create_future())
            try:
                request = b"GET %b%b HTTP/1.1\r\n%baccept: */*\r\nconnection: close\r\n\r\n"
                data = request % (self.site.prefix, path.encode(), self.lines)
                connection.request(data, found, Waits(), bodiless=True)
                return await found.status
            finally:
                connection.abort()

    def keep(self, connection: Connection) -> None:
        """Its answer is complete; the next request may use it."""
        if self._closed:
            connection.close()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def expire(self) -> None:
        """Close what has been idle too long to be used."""
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_S
        for connection in [one for one in self._idle if one.idle_since < oldest]:
            self._idle.remove(connection)
            connection.close()

    def forget(self, connection: Connection) -> None:
        """Its end has come, idle or not: it is not used again."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close what is idle, and what will be."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
