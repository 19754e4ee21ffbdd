"""Who may ask: a key where one is set, as vLLM asks for it, and pages from origins that are allowed."""

from __future__ import annotations

import json
import secrets

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.errors import ApiError

# The environment's name for the key, where no other user of the machine sees it.
KEY_VARIABLE = "VLLM_API_KEY"


class KeyCheck:
    """Refuses requests under /v1 without the key; a plain ASGI application around another."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        guarded = scope["type"] == "http" and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS"
        if guarded and not secrets.compare_digest(given, self._expected):
            await ApiError(401, "Unauthorized").respond()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def add_access(app: FastAPI, key: str | None, origins: str | None) -> None:
    """Ask for a key, and allow origins, where there are some.

    Raises:
        DiffusionError: the origins are no JSON list of texts.
    """
    if key:
        app.add_middleware(KeyCheck, key=key)
    if origins is None:
        return
    try:
        allowed = json.loads(origins)
    except ValueError:
        allowed = None
    if not isinstance(allowed, list) or not all(isinstance(origin, str) for origin in allowed):
        raise DiffusionError(f"--allowed-origins: expected a JSON list of texts, got {origins!r}")
    app.add_middleware(CORSMiddleware, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"])
