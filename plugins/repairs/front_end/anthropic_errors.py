"""Errors of the Messages API in Anthropic's form, where vLLM answers in OpenAI's.

What is wrong with a body before a route's own code sees it (no JSON, a missing field, a wrong type) is answered by
handlers that serve all routes alike: `{"error": {…}}`. Anthropic's clients read `{"type": "error", "error": {…}}`.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_request_limits.py::test_stock_answers_messages_in_openais_form` fails.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

APPLICATION, ROUTER = "vllm.entrypoints.launchers.app", "vllm.entrypoints.anthropic.api_router"
ROUTES = "/v1/messages"
# https://docs.claude.com/en/api/errors
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}  # fmt: skip


def translate(body: bytes, status: int) -> dict[str, Any] | None:
    """Anthropic's error for one of OpenAI's; None for what is none."""
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or answer.get("type") == "error":
        return None
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error.get("message", ""))}}


def wrap(stock: Callable[[Any, Exception], Awaitable[Any]]) -> Callable[[Any, Exception], Awaitable[Any]]:
    """Wrap an exception handler of the application's, so that it minds the route."""

    async def handle(request: Any, error: Exception) -> Any:
        from starlette.responses import JSONResponse

        response = await stock(request, error)
        if not request.url.path.startswith(ROUTES):
            return response
        translated = translate(bytes(response.body), response.status_code)
        return response if translated is None else JSONResponse(translated, response.status_code)

    return handle


def translate_error_response(response: Any) -> Any:
    """`anthropic.api_router.translate_error_response`, which gives vLLM's names of errors for Anthropic's."""
    from starlette.responses import JSONResponse

    return JSONResponse(translate(response.model_dump_json().encode(), response.error.code), response.error.code)


def apply() -> None:
    """Replace vLLM's functions in the process that builds the application; elsewhere its module is not there.

    The routes' module is imported here: plugins are loaded before the application imports it.
    """
    module = sys.modules.get(APPLICATION)
    if module is None:
        return
    importlib.import_module(ROUTER).translate_error_response = translate_error_response  # type: ignore[attr-defined]
    if getattr(module.init_exception_handler, "minds_the_route", False):
        return
    stock = module.init_exception_handler

    def init_exception_handler(app: Any) -> None:
        before = dict(app.exception_handlers)
        stock(app)
        for kind, handler in list(app.exception_handlers.items()):
            if before.get(kind) is not handler:
                app.exception_handlers[kind] = wrap(handler)

    init_exception_handler.minds_the_route = True  # type: ignore[attr-defined]
    module.init_exception_handler = init_exception_handler  # type: ignore[attr-defined]
