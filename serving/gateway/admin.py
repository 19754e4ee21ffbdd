"""The admin application, on a port of its own: the gateway's state and the weights of its engines.

What the gateway is doing is there as JSON and as a page. Steering routes have vLLM's names, and go to all engines of a
model. What it refuses, or cannot do, is an error in OpenAI's form; an update's report says in words what went wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated

import jinja2
import msgspec
from fastapi import Body, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as AnyHttpException
from starlette.requests import ClientDisconnect

from laguna_serve.serving.gateway import admin_usage
from laguna_serve.serving.gateway.admin_models import hold, make_router
from laguna_serve.serving.gateway.admin_trl import add_trl, read_basic
from laguna_serve.serving.gateway.config.listening import Admin
from laguna_serve.serving.gateway.engines import digests
from laguna_serve.serving.gateway.engines.update import PauseMode, RefusedError, StepError, UpdateRequest, Version
from laguna_serve.serving.gateway.engines.weights import WeightGroup
from laguna_serve.serving.gateway.services import Services
from laguna_serve.serving.gateway.status import describe
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.local_http import LOOPBACK

# vLLM's routes, forwarded to every engine of a model: commands that leave its weights as they are, and queries.
ENGINE_COMMANDS = ("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "sleep", "wake_up")
CACHE_RESETS = ("reset_prefix_cache", "reset_encoder_cache", "reset_mm_cache")
ENGINE_QUERIES = ("weight_info", "is_paused", "is_sleeping", "get_world_size")
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
SEVERAL_WORKERS = (
    "This gateway is several processes (server.workers), which do not steer or ask engines as one: do it through a"
    " gateway with workers = 1, or at each engine's own address."
)
Payload = JsonObject | list[JsonObject]
Model = Annotated[str | None, Query(description="default: the only one")]


def create_admin_app(find: Callable[[], Services], admin: Admin) -> FastAPI:
    """Create the application beside the gateway's, whose parts `find` gives: it may start later than this one."""
    groups: dict[str, WeightGroup] = {}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = importlib.resources.files(__package__).joinpath("status.html.j2").read_text(encoding="utf-8")
    template = environment.from_string(page)
    app = FastAPI(title="Laguna gateway, admin", docs_url=None, redoc_url=None, responses=REFUSALS)

    def find_group(model: str | None) -> WeightGroup:
        services = find()
        if services.peers is not None:
            raise HTTPException(409, SEVERAL_WORKERS)
        pools = services.relay.pools
        known = f"it must be one of {', '.join(sorted(pools))}."
        if model is None and len(pools) > 1:
            raise HTTPException(400, f"The query parameter 'model' is missing: {known}")
        name = next(iter(pools)) if model is None else model
        if name not in pools:
            raise HTTPException(404, f"The model {name!r} does not exist: {known}")
        group = groups.get(name)
        if group is None or group.pool is not pools[name]:
            group = groups[name] = WeightGroup(pools[name], services.steps)
        return group

    @asynccontextmanager
    async def alone(model: str | None) -> AsyncIterator[WeightGroup]:
        group = find_group(model)
        if group.lock.locked():
            raise HTTPException(409, "Another update of this model is under way. Please try again when it has ended.")
        owner = find().relay.owner
        with hold(owner, owner.find(group.pool.model.name)):
            async with group.lock:
                yield group

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse a page in a browser on this machine, and whoever has not the key, where there is one."""
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

    @app.get("/admin/status")
    async def status() -> JsonObject:
        """Engines, load, acceptance, speed, weights and the last errors."""
        return await describe(find(), time.monotonic())

    @app.get("/", response_class=HTMLResponse)
    async def show() -> str:
        """Show the same as a page."""
        found = await describe(find(), time.monotonic())
        return await asyncio.to_thread(template.render, status=found)  # of thousands of keys 0.2 s

    @app.post("/admin/update_weights")
    async def apply(request: UpdateRequest, model: Model = None) -> Response:
        """Pause, update, verify and resume all engines of a model, or leave all as they were."""
        async with alone(model) as group:
            report = await group.apply(request)
        return JSONResponse(report, 200 if report["outcome"] == "updated" else 502)

    @app.get(digests.ROUTE)
    async def compare(model: Model = None) -> JsonObject:
        """Digests of the weights that the engines of a model serve with, which are the same on all; 502 if not."""
        async with alone(model) as group:
            found = await group.compare(group.pool.engines)
        return {engine.name: msgspec.to_builtins(ranks) for engine, ranks in found.items()}

    @app.post("/pause")
    async def pause(mode: PauseMode = "abort", model: Model = None) -> JsonObject:
        """Let requests wait in the gateway until `/resume`."""
        async with alone(model) as group:
            await group.pause(mode)
        return {"status": "paused"}

    @app.post("/resume")
    async def resume(model: Model = None) -> JsonObject:
        """Let the requests that wait in the gateway go on to their engines."""
        async with alone(model) as group:
            await group.resume()
        return {"status": "resumed"}

    @app.post("/start_weight_update")
    async def start(model: Model = None) -> JsonObject:
        """Begin an update of the model."""
        async with alone(model) as group:
            await group.start("update")
        return {"message": "Weight update started"}

    @app.post("/start_draft_weight_update")
    async def start_draft(model: Model = None) -> JsonObject:
        """Begin an update of its drafter."""
        async with alone(model) as group:
            await group.start("draft_update")
        return {"message": "Draft weight update started"}

    @app.post("/update_weights")
    async def update(update_info: Annotated[Payload, Body(embed=True)], model: Model = None) -> JsonObject:
        """Update a part of the weights."""
        async with alone(model) as group:
            await group.update(update_info)
        return {"message": "Weights updated"}

    @app.post("/finish_weight_update")
    async def finish(
        weight_version: Annotated[Version | None, Body(embed=True)] = None,
        draft_version: Annotated[Version | None, Body(embed=True)] = None,
        model: Model = None,
    ) -> JsonObject:
        """All engines have them; answers say so from now on."""
        async with alone(model) as group:
            await group.finish(weight_version, draft_version)
        return {"message": "Weight update finished"}

    app.include_router(make_router(lambda: find().relay.owner))
    app.include_router(admin_usage.make_router(find))

    async def pass_on(request: Request) -> Response:
        group = find_group(request.query_params.get("model"))
        params = [(name, value) for name, value in request.query_params.multi_items() if name != "model"]
        body = await _read_json(request)
        answers = await group.call(request.url.path, group.pool.engines, body, params, request.method)
        return JSONResponse({engine.name: answer for engine, answer in answers.items()})

    for names, method in ((ENGINE_COMMANDS + CACHE_RESETS, "POST"), (ENGINE_QUERIES, "GET")):
        for name in names:
            app.add_api_route(f"/{name}", pass_on, methods=[method], description="As vLLM's, of every engine.")
    if admin.trl is not None:
        add_trl(app, admin.trl, find, alone)
    return app


def refuse(status: int, message: str, headers: Mapping[str, str] | None = None, **more: JsonObject) -> JSONResponse:
    """Refuse a request, in OpenAI's form; `more` stands beside the error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return answer(GatewayError(status, kind, message), headers, **more)


def answer(error: GatewayError, headers: Mapping[str, str] | None = None, **more: JsonObject) -> JSONResponse:
    """Answer with an error of the gateway's."""
    return JSONResponse({"error": error.describe(), **more}, error.status, headers)


async def _read_json(request: Request) -> JsonObject | None:
    """Read the body's object, None without a body. Raises HTTPException: 400 it is none."""
    try:
        data = await request.body()
    except ClientDisconnect:
        raise HTTPException(400, "The client left before its body was there.") from None
    if not data:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"{NO_JSON}: {error}") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "The body is no JSON object.")
    return body


def _read_host(request: Request) -> str:
    """Read the Host header without its port, nor the brackets of an IPv6 address."""
    host = request.headers.get("host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
