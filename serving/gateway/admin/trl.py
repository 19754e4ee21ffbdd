"""Trainers' own clients on the admin port, under /trl: one model as a single vLLM, with the routes that steer it.

TRL's client has one base URL for rollouts and weights, and sends no bearer key. Keys go into that URL, which makes
them Basic credentials: the password is the admin port's key, the user name the gateway's own where that asks for one.
It repeats what gets 500, 502 or 503, which no step of a transfer may be: these are refused with 409.
prime-rl pauses, names the folder that its trainer wrote, and resumes; it repeats all of 500 and above.
Read against TRL 1.16 (generation/vllm_client.py, experimental/async_grpo/vllm_client.py) and prime-rl at 559b447
(src/prime_rl/utils/client.py).
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Body, FastAPI, HTTPException, Response

from laguna_serve.serving.gateway.admin.services import Services
from laguna_serve.serving.gateway.clients.asgi import Receive, RelayApp, Scope, Send
from laguna_serve.serving.gateway.config.endpoint import TOKEN
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.transfer import Transfer, name_next
from laguna_serve.serving.gateway.engines.update import PauseMode, RefusedError, StepError, UpdateRequest, Version
from laguna_serve.serving.gateway.engines.weights import RESET, WeightGroup
from laguna_serve.serving.kit.results import JsonObject

PREFIX = "/trl"
NO_ROUTES = "; the engine needs VLLM_SERVER_DEV_MODE=1, which laguna serve --weight-updates sets"
NO_WEIGHTS = (
    "update_weights: expected update_info or the weight_dir of a folder, got neither; "
    'with prime-rl set weight_broadcast.type = "filesystem"'
)
# A folder of prime-rl's: …/broadcasts/step_12, or …/checkpoints/step_12/weight.
STEP = re.compile(r"step_[0-9]{1,18}")
Alone = Callable[[str | None], AbstractAsyncContextManager[WeightGroup]]


def add_trl(app: FastAPI, model: str, find: Callable[[], Services], alone: Alone) -> None:
    """Add the routes for a model; what is not among them is relayed as on the public port.

    `alone` gives the model's engines to one who changes their weights.
    """
    router = APIRouter(prefix=PREFIX)
    transfers = list[Transfer]()  # one, of the model's present engines

    @asynccontextmanager
    async def transfer() -> AsyncIterator[Transfer]:
        async with alone(model) as group:
            if not transfers or transfers[0].group is not group:
                transfers[:] = [Transfer(group)]
            try:
                yield transfers[0]
            except RefusedError as error:
                raise HTTPException(409, str(error)) from None
            except StepError as error:
                raise HTTPException(409, str(error) + (NO_ROUTES if "HTTP 404" in str(error) else "")) from None

    def find_pool() -> Pool:
        if (pool := find().relay.pools.get(model)) is None:
            raise HTTPException(404, f"The model {model!r} of admin.trl does not exist: a reload has taken it out.")
        return pool

    @router.get("/health")
    async def health() -> Response:
        """200 once an engine is up: TRL waits for it."""
        return Response(status_code=200 if find_pool().is_ready(time.monotonic()) else 503)

    @router.get("/server_info")
    async def server_info() -> JsonObject:
        """Describe the first engine; its weight transfer is null unless all have one that TRL can use."""
        async with transfer() as found:
            return {"vllm_config": await found.describe()}

    @router.get("/get_world_size")
    async def get_world_size() -> JsonObject:
        """Count the workers of all engines."""
        async with transfer() as found:
            return {"world_size": await found.count_workers()}

    @router.post("/init_weight_transfer_engine")
    async def join(init_info: Annotated[JsonObject, Body(embed=True)]) -> JsonObject:
        """Let every engine join the trainer's process group."""
        async with transfer() as found:
            await found.join(init_info)
        return {"message": "Weight transfer initialized"}

    @router.post("/start_weight_update")
    async def start() -> JsonObject:
        """Hold requests and begin an update."""
        async with transfer() as found:
            await found.start()
        return {"message": "Weight update started"}

    @router.post("/update_weights")
    async def update(
        update_info: Annotated[JsonObject | list[JsonObject] | None, Body(embed=True)] = None,
        weight_dir: Annotated[str | None, Body(embed=True)] = None,
    ) -> JsonObject:
        """Tell the engines of tensors that come; or, as prime-rl does, of a folder that has them all."""
        async with transfer() as found:
            if update_info is not None:
                await found.update(update_info)
            elif weight_dir is not None:
                report = await found.group.apply(read_step(weight_dir, found.group.pool.newest))
                if report["outcome"] != "updated":
                    raise HTTPException(409, report["error"])
            else:
                raise HTTPException(422, NO_WEIGHTS)
        return {"message": "Weights updated"}

    @router.post("/finish_weight_update")
    async def finish(weight_version: Annotated[Version | None, Body(embed=True)] = None) -> JsonObject:
        """Let answers have the next version, and requests go on."""
        async with transfer() as found:
            return {"message": "Weight update finished", "weight_version": await found.finish(weight_version)}

    @router.post("/reset_prefix_cache")
    async def reset(reset_running_requests: bool = False) -> JsonObject:
        """Drop kept prefixes on every engine."""
        async with transfer() as found:
            params = {"reset_running_requests": str(reset_running_requests).lower()}
            answers = await found.group.call(RESET, found.group.pool.engines, params=params)
        return {"success": all(answer["success"] for answer in answers.values())}

    @router.post("/pause")
    async def pause(mode: PauseMode = "abort") -> JsonObject:
        """Let requests wait until `/resume`, as TRL's asynchronous trainers do around an update."""
        async with transfer() as found:
            await found.group.pause(mode)
        return {"status": "paused"}

    @router.post("/resume")
    async def resume() -> JsonObject:
        """Let requests go on."""
        async with transfer() as found:
            await found.group.resume()
        return {"status": "resumed"}

    @router.get("/v1/models")
    async def models() -> Response:
        """List the model by its name, and what else its engines call it: TRL takes the first."""
        shown = find_pool()
        body = await find().relay.catalog.render_list(lambda pool, _: pool is shown)
        return Response(body, media_type="application/json")

    app.include_router(router)
    app.mount(PREFIX, _Relayed(find))


def read_step(folder: str, version: bytes) -> UpdateRequest:
    """Read a folder of prime-rl's as an update; its version is the step in the path, or the one behind `version`."""
    steps = [part for part in PurePath(folder).parts if STEP.fullmatch(part)]
    return UpdateRequest(weight_version=steps[-1] if steps else name_next(version), update=[{"folder": folder}])


class _Relayed:
    """The relay under the prefix, with the user name of Basic credentials as its key."""

    def __init__(self, find: Callable[[], Services]) -> None:
        self._find = find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(PREFIX)
        raw = (scope.get("raw_path") or scope["path"].encode()).removeprefix(PREFIX.encode())
        headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        user, _ = read_basic(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
        if TOKEN.fullmatch(user):  # nothing else could be a header's
            headers.append((b"authorization", b"Bearer " + user.encode()))
        await RelayApp(self._find().relay)({**scope, "path": path, "raw_path": raw, "headers": headers}, receive, send)


def read_basic(authorization: str) -> tuple[str, str]:
    """Read user and password of a header's value; empty where there are none."""
    kind, _, given = authorization.partition(" ")
    if kind.lower() != "basic":
        return "", ""
    try:
        user, _, password = base64.b64decode(given.strip(), validate=True).decode("latin-1").partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return user, password
