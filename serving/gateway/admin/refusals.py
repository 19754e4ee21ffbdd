"""What the admin port refuses, and how errors are answered: in OpenAI's form, whatever made them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHttpException

from laguna_serve.serving.gateway.admin.trl import read_basic
from laguna_serve.serving.gateway.config.listening import Admin
from laguna_serve.serving.gateway.engines.update import RefusedError, StepError
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.local_http import LOOPBACK

REFUSALS: dict[int | str, JsonObject] = {
    400: {"description": "no model named where there are several, a body that is no JSON, or a strange Host"},
    401: {"description": "no admin key"},
    403: {"description": "from a page in a browser"},
    404: {"description": "no such model"},
    409: {"description": "another update is under way, or none is where a step needs one"},
    413: {"description": "a body of more than server.max_body_bytes"},
    415: {"description": "a body that the Content-Type header does not call JSON, or that is compressed"},
    422: {"description": "JSON that is not what the route takes; what, and where"},
    501: {"description": "a body in a transfer coding other than chunked"},
    502: {"description": "an engine failed; which, and how"},
}
NO_JSON = "The body is no JSON"
# What Starlette says of a path that it does not know.
NO_ROUTE = "Not Found"
NOT_MARKED_JSON = "content-type: expected application/json, got {}; send it as a header of the request"
STRANGE_HOST = (
    "The Host header names another machine. The admin port answers to 127.0.0.1, ::1 and localhost alone, so that no"
    " web page can reach it by a name of its own."
)
FROM_A_PAGE = (
    "The request has an Origin header, as those of web pages have. Pages may not steer engines: send it from a program,"
    " without that header."
)


def add_guard(app: FastAPI, admin: Admin) -> None:
    """Refuse a page in a browser on this machine, and whoever has not the key, where there is one."""

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if admin.host in LOOPBACK and _read_host(request) not in LOOPBACK:
            # Else a page could come by a name of its own that leads to this machine.
            return refuse(400, STRANGE_HOST)
        if request.method != "GET" and "origin" in request.headers:
            return refuse(403, FROM_A_PAGE)
        if admin.sha256 is not None:
            authorization = request.headers.get("authorization", "")
            kind, _, given = authorization.partition(" ")
            given = given.strip() if kind.lower() == "bearer" else read_basic(authorization)[1]
            if not hmac.compare_digest(hashlib.sha256(given.encode("latin-1")).hexdigest(), admin.sha256):
                message = "The admin port asks for its key: Authorization: Bearer KEY."
                return refuse(401, message, {"www-authenticate": "Bearer"})
        return await go_on(request)


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors of routes, and of what is no route, in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> Response:
        """400 for what is no JSON; 422 for JSON that is not what the route takes, with the places in it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if error.body is not None and not (kind == "application/json" or kind.endswith("+json")):
            return refuse(415, NOT_MARKED_JSON.format(kind or "none"))
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(400, f"{NO_JSON}: {first['ctx']['error']}")
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        return refuse(422, "; ".join(faults))

    @app.exception_handler(AnyHttpException)
    async def put_in_form(request: Request, error: AnyHttpException) -> Response:
        """Tell what a route refuses, and that there is no such route, or not for such a method."""
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            return refuse(405, f"{request.url.path}: expected {allowed}, got {request.method}.", error.headers)
        if error.status_code == 404 and error.detail == NO_ROUTE:
            return answer(errors.unknown_path(request.method, request.url.path))
        return refuse(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def admit(request: Request, error: Exception) -> Response:
        """Admit a defect; its traceback is in the log."""
        return answer(errors.failed())

    @app.exception_handler(StepError)
    async def tell(request: Request, error: StepError) -> Response:
        return refuse(502, str(error), upstreams={engine.name: text for engine, text in error.errors.items()})

    @app.exception_handler(RefusedError)
    async def refuse_step(request: Request, error: RefusedError) -> Response:
        return refuse(409, str(error))


def refuse(status: int, message: str, headers: Mapping[str, str] | None = None, **more: JsonObject) -> JSONResponse:
    """Refuse a request, in OpenAI's form; `more` stands beside the error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return answer(GatewayError(status, kind, message), headers, **more)


def answer(error: GatewayError, headers: Mapping[str, str] | None = None, **more: JsonObject) -> JSONResponse:
    """Answer with an error of the gateway's."""
    return JSONResponse({"error": error.describe(), **more}, error.status, headers)


def _read_host(request: Request) -> str:
    """Read the Host header without its port, nor the brackets of an IPv6 address."""
    host = request.headers.get("host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
