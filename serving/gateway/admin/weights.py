"""The admin port's routes for the weights of engines: vLLM's own names, for all engines of a model at once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
from fastapi import APIRouter, Body, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from laguna_serve.serving.gateway.admin.models import hold
from laguna_serve.serving.gateway.admin.refusals import NO_JSON
from laguna_serve.serving.gateway.admin.services import Services
from laguna_serve.serving.gateway.engines import digests
from laguna_serve.serving.gateway.engines.update import PauseMode, UpdateRequest, Version
from laguna_serve.serving.gateway.engines.weights import WeightGroup
from laguna_serve.serving.kit.results import JsonObject

# vLLM's routes, forwarded to every engine of a model: commands that leave its weights as they are, and queries.
ENGINE_COMMANDS = ("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "sleep", "wake_up")
CACHE_RESETS = ("reset_prefix_cache", "reset_encoder_cache", "reset_mm_cache")
ENGINE_QUERIES = ("weight_info", "is_paused", "is_sleeping", "get_world_size")
SEVERAL_WORKERS = (
    "This gateway is several processes (server.workers), which do not steer or ask engines as one: do it through a"
    " gateway with workers = 1, or at each engine's own address."
)
Payload = JsonObject | list[JsonObject]
Model = Annotated[str | None, Query(description="default: the only one")]


class Groups:
    """The engines of each model, as far as their weights go; `find` gives the gateway's parts once it has started."""

    def __init__(self, find: Callable[[], Services]) -> None:
        self._find = find
        self._groups: dict[str, WeightGroup] = {}

    def find(self, model: str | None) -> WeightGroup:
        """Find a model's, by default the only one's. Raises HTTPException: 400, 404, 409 of several processes."""
        services = self._find()
        if services.peers is not None:
            raise HTTPException(409, SEVERAL_WORKERS)
        pools = services.relay.pools
        known = f"it must be one of {', '.join(sorted(pools))}."
        if model is None and len(pools) > 1:
            raise HTTPException(400, f"The query parameter 'model' is missing: {known}")
        name = next(iter(pools)) if model is None else model
        if name not in pools:
            raise HTTPException(404, f"The model {name!r} does not exist: {known}")
        group = self._groups.get(name)
        if group is None or group.pool is not pools[name]:
            group = self._groups[name] = WeightGroup(pools[name], services.steps)
        return group

    @asynccontextmanager
    async def alone(self, model: str | None) -> AsyncIterator[WeightGroup]:
        """Give a model's engines, loaded, to one update at a time. Raises HTTPException: as `find`, and 409."""
        group = self.find(model)
        if group.lock.locked():
            raise HTTPException(409, "Another update of this model is under way. Please try again when it has ended.")
        owner = self._find().relay.owner
        with hold(owner, owner.find(group.pool.model.name)):
            async with group.lock:
                yield group


def make_router(groups: Groups) -> APIRouter:
    """Make the routes that change or show the weights of a model's engines."""
    router, alone = APIRouter(), groups.alone

    @router.post("/admin/update_weights")
    async def apply(request: UpdateRequest, model: Model = None) -> Response:
        """Pause, update, verify and resume all engines of a model, or leave all as they were."""
        async with alone(model) as group:
            report = await group.apply(request)
        return JSONResponse(report, 200 if report["outcome"] == "updated" else 502)

    @router.get(digests.ROUTE)
    async def compare(model: Model = None) -> JsonObject:
        """Digests of the weights that the engines of a model serve with, which are the same on all; 502 if not."""
        async with alone(model) as group:
            found = await group.compare(group.pool.engines)
        return {engine.name: msgspec.to_builtins(ranks) for engine, ranks in found.items()}

    @router.post("/pause")
    async def pause(mode: PauseMode = "abort", model: Model = None) -> JsonObject:
        """Let requests wait in the gateway until `/resume`."""
        async with alone(model) as group:
            await group.pause(mode)
        return {"status": "paused"}

    @router.post("/resume")
    async def resume(model: Model = None) -> JsonObject:
        """Let the requests that wait in the gateway go on to their engines."""
        async with alone(model) as group:
            await group.resume()
        return {"status": "resumed"}

    @router.post("/start_weight_update")
    async def start(model: Model = None) -> JsonObject:
        """Begin an update of the model."""
        async with alone(model) as group:
            await group.start("update")
        return {"message": "Weight update started"}

    @router.post("/start_draft_weight_update")
    async def start_draft(model: Model = None) -> JsonObject:
        """Begin an update of its drafter."""
        async with alone(model) as group:
            await group.start("draft_update")
        return {"message": "Draft weight update started"}

    @router.post("/update_weights")
    async def update(update_info: Annotated[Payload, Body(embed=True)], model: Model = None) -> JsonObject:
        """Update a part of the weights."""
        async with alone(model) as group:
            await group.update(update_info)
        return {"message": "Weights updated"}

    @router.post("/finish_weight_update")
    async def finish(
        weight_version: Annotated[Version | None, Body(embed=True)] = None,
        draft_version: Annotated[Version | None, Body(embed=True)] = None,
        model: Model = None,
    ) -> JsonObject:
        """All engines have them; answers say so from now on."""
        async with alone(model) as group:
            await group.finish(weight_version, draft_version)
        return {"message": "Weight update finished"}

    return router


def make_forwarding_router(groups: Groups) -> APIRouter:
    """Make the routes that every engine of a model is asked, whose answers come by engine."""
    router = APIRouter()

    async def pass_on(request: Request) -> Response:
        group = groups.find(request.query_params.get("model"))
        params = [(name, value) for name, value in request.query_params.multi_items() if name != "model"]
        body = await read_json(request)
        answers = await group.call(request.url.path, group.pool.engines, body, params, request.method)
        return JSONResponse({engine.name: answer for engine, answer in answers.items()})

    for names, method in ((ENGINE_COMMANDS + CACHE_RESETS, "POST"), (ENGINE_QUERIES, "GET")):
        for name in names:
            router.add_api_route(f"/{name}", pass_on, methods=[method], description="As vLLM's, of every engine.")
    return router


async def read_json(request: Request) -> JsonObject | None:
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
