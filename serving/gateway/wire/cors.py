"""Which web pages may read answers (https://fetch.spec.whatwg.org/#http-cors-protocol).

Where `server.allowed_origins` says so, preflights are answered here, and the gateway's headers stand in place of an
engine's.

Without the setting preflights pass to the engine, without a key as browsers send them, and its own headers to the page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import Head, Headers, read_head

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
LIMITS = tuple(
    f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")
)
EXPOSED = ", ".join(
    ("retry-after", "x-request-id", "x-upstream", "x-weight-version", "x-draft-version", "x-fallback-from", *LIMITS)
).encode()
MAX_AGE_S = b"600"
PREFIX = b"access-control-"
VARY = (b"vary", b"Origin")


class Cors:
    """The rules of one configuration."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self.enabled = bool(allowed)
        self._any = "*" in allowed
        self._allowed = frozenset(origin.encode() for origin in allowed)

    def list_headers(self, origin: bytes | None) -> Headers:
        """Of every answer to a request of this origin, if it has one."""
        if self._any:
            # Never beside allow-credentials: browsers refuse that, as any page could act in its visitor's name.
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
        if not self._is_allowed(origin):
            return [VARY]  # a cache must not give this answer to an origin that is allowed
        return [
            (b"access-control-allow-origin", origin or b""),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", EXPOSED),
            VARY,
        ]

    def answer_preflight(self, head: Head) -> tuple[int, Headers, bytes] | None:
        """Status, headers (beside `list_headers`) and body of the answer; None where the request is no preflight."""
        origin, method = head.named.get(b"origin"), head.named.get(b"access-control-request-method")
        if head.method != "OPTIONS" or origin is None or method is None:
            return None
        if not (self._any or self._is_allowed(origin)):
            error = errors.strange_origin()
            return error.status, error.headers(), error.body(head.path)
        found = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", MAX_AGE_S)]
        # Named one by one: "*" would not cover Authorization.
        if (wanted := head.named.get(b"access-control-request-headers")) is not None:
            found.append((b"access-control-allow-headers", wanted))
        return 204, found, b""

    def replace_headers(self, headers: Headers, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """Give an engine's answer's headers these rules instead of its own; names in lower case."""
        kept = [(name, value) for name, value in headers if not name.startswith(PREFIX)]
        return [*kept, *self.list_headers(origin)]

    def _is_allowed(self, origin: bytes | None) -> bool:
        return origin is not None and origin.lower() in self._allowed


class CorsMiddleware:
    """The same for `paths` that an ASGI application answers itself; `find` has the rules of the moment, if any."""

    def __init__(self, app: Application, paths: Collection[str], find: Callable[[], Cors | None]) -> None:
        self._app, self._paths, self._find = app, paths, find

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths or (cors := self._find()) is None:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        head = read_head(scope["method"], path, path.encode(), scope["query_string"], scope["headers"])
        if (answer := cors.answer_preflight(head)) is not None:
            status, headers, body = answer
            found = [*headers, *cors.list_headers(head.named.get(b"origin"))]
            await send({"type": "http.response.start", "status": status, "headers": found})
            await send({"type": "http.response.body", "body": body})
            return

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = cors.replace_headers(message.get("headers", ()), head.named.get(b"origin"))
            await send(message)

        await self._app(scope, receive, add)
