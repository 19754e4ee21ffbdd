"""One replica: a gateway of its own in this process, which owns one engine, and relays what it says.

The gateway is the one of `laguna gateway`, on the loopback address: it starts and watches the engine, ends streams in
good order when that dies, and takes new weights. An engine that has died is not started again here: the replica says
that it is not well, and Ray makes another one, which takes the weights of now before it says that it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

import aiohttp
import msgspec
from ray import get_runtime_context, serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.cluster.messages import AnswerHead, Ask, NewWeights, ReplicaState, Reply, Told, Version
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.config import Config, parse_config
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.engines import digests
from laguna_serve.serving.gateway.residence.model import OwnedModel, State
from laguna_serve.serving.gateway.run import Background, open_background
from laguna_serve.serving.gateway.wire.headers import HOP_BY_HOP, NOT_FORWARDED, REQUEST_ID
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.supervision.default_logs import find_replica_log

POLL_S = 0.2
# A replica that has taken as many versions while it started has a trainer that is faster than it.
MOST_VERSIONS = 10
KEEPER_TIMEOUT_S = 10.0
LEAVE_S = 2.0
STEP_TIMEOUT_S = 600.0
# Beyond the time in which requests finish: the engine's own end.
MARGIN_S = 30.0
PASSED_BACK = HOP_BY_HOP | {b"content-length"}
REPLICA = b"x-replica"
Step = tuple[str, JsonObject | None]
logger = logging.getLogger("ray.serve")


class ReplicaUnwellError(Exception):
    """A replica without an engine that may answer; Ray replaces it."""


class Replica:
    """A model's engine, as Ray Serve keeps it. `keeper` is the name of the deployment that knows the weights of now."""

    async def __init__(self, name: str, engine: OwnedEngine, keeper: str | None) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        self._name, self._engine, self._id = name, engine, context.replica_id.unique_id
        self._keeper = None if keeper is None else serve.get_deployment_handle(keeper, context.app_name)
        self._epoch: int | None = 0
        # Whether its last load succeeded: else its weights are no epoch's, whatever it is told.
        self._loaded = True
        self._told: Told | None = None
        self._operation = ""
        self._outcome: asyncio.Task[Reply] | None = None
        self._closed = False
        self._stack = contextlib.ExitStack()
        try:
            opened = open_background(make_gateway(name, engine, self._id))
            self._gateway: Background = await asyncio.to_thread(self._stack.enter_context, opened)
            self._session = aiohttp.ClientSession(
                auto_decompress=False, timeout=aiohttp.ClientTimeout(None), connector=aiohttp.TCPConnector(limit=0)
            )
            await self._wait_until_ready()
            if self._keeper is not None:
                await self._join()
        except BaseException:
            await self._close()
            raise

    async def __del__(self) -> None:
        await self._close()

    async def ask(self, ask: Ask) -> AsyncIterator[AnswerHead | bytes]:
        """Relay one request: the head of the engine's answer, then its body in the pieces in which it comes.

        Raises:
            ReplicaUnwellError: it has no engine any more; another replica may have one.
            OSError, aiohttp.ClientError: the gateway in this process has ended.
        """
        self._require_well()
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in _pass_on(ask.headers)]
        url = self._gateway.url + ask.target
        async with self._session.request(ask.method, url, headers=headers, data=ask.body) as answer:
            passed = [(n.lower(), v) for n, v in answer.raw_headers if n.lower() not in PASSED_BACK]
            yield AnswerHead(answer.status, [*passed, (REPLICA, self._id.encode())])
            async for piece in answer.content.iter_any():
                yield piece

    async def check_health(self) -> None:
        """Raise ReplicaUnwellError where the engine has died, or has other weights than it should."""
        self._require_well()
        if self._keeper is None:
            return
        try:
            known = await asyncio.wait_for(
                self._keeper.confirm.remote(self._name, self._id, self._epoch, self._told), KEEPER_TIMEOUT_S
            )
        except (RayError, RayServeException, TimeoutError):
            return  # it is being started again, and is asked again
        if not known:
            raise ReplicaUnwellError(f"replica {self._id}: expected the weights of now, got others")

    async def describe(self) -> ReplicaState:
        """Describe where this replica is, and which weights it has: `handle.broadcast("describe")` asks all."""
        node = get_runtime_context().get_node_id()
        return ReplicaState(self._id, node, os.getpid(), self._gateway.url, self._epoch, self._told)

    async def hold(self, operation: str, mode: str) -> Reply:
        """Hold new requests back, and pause the engine with those that it has."""
        return await self._once(operation, lambda: self._take([(f"/pause?mode={mode}", None)]))

    async def load(self, operation: str, new: NewWeights) -> Reply:
        """Load weights; the engine is on hold, and no version's until `release`."""
        self._epoch = None
        reply = await self._once(operation, lambda: self._load(new))
        self._loaded = reply.error is None
        return reply

    async def release(self, operation: str, epoch: int) -> Reply:
        """Go on, with the weights of an epoch; one that could not load them has none, and is replaced."""
        reply = await self._once(operation, lambda: self._take([("/resume", None)]))
        if reply.error is None and self._loaded:
            self._epoch = epoch
        return reply

    async def _once(self, operation: str, act: Callable[[], Awaitable[Reply]]) -> Reply:
        """Carry out an operation; the same one again, and its outcome is told again."""
        if operation != self._operation or self._outcome is None:
            self._operation, self._outcome = operation, asyncio.ensure_future(act())
        return await asyncio.shield(self._outcome)

    async def _load(self, new: NewWeights) -> Reply:
        """Load weights, and say what they are then, where that is asked for."""
        self._told = None
        reply = await self._take(self._list_steps(new))
        if new.digests and reply.error is None:
            self._told = await self._digest()
        return replace(reply, told=self._told)

    async def _digest(self) -> Told:
        """Digest the weights that the engine has, or say why it cannot."""
        engine = hashlib.sha256(self._engine.model_dump_json().encode()).hexdigest()
        timeout = aiohttp.ClientTimeout(total=STEP_TIMEOUT_S)
        try:
            async with self._session.get(self._gateway.admin_url + digests.ROUTE, timeout=timeout) as answer:
                body = await answer.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Told(engine, fault=f"{type(error).__name__}: {error}")
        if answer.status != 200:
            return Told(engine, fault=f"HTTP {answer.status}: {body[:300]}")
        return read_digests(engine, body)

    async def _take(self, steps: Sequence[Step]) -> Reply:
        timeout = aiohttp.ClientTimeout(total=STEP_TIMEOUT_S)
        for path, body in steps:
            try:
                async with self._session.post(self._gateway.admin_url + path, json=body, timeout=timeout) as answer:
                    if answer.status != 200:
                        return Reply(
                            self._id, f"{path}: HTTP {answer.status}: {(await answer.text(errors='replace'))[:300]}"
                        )
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return Reply(self._id, f"{path}: {type(error).__name__}: {error}")
        return Reply(self._id)

    def _list_steps(self, new: NewWeights) -> list[Step]:
        steps: list[Step] = []
        if new.update:
            steps.append(("/start_weight_update", None))
            steps += [("/update_weights", {"update_info": self._fill(body, "model")}) for body in new.update]
            steps.append(("/finish_weight_update", {"weight_version": new.weight_version}))
        if new.draft_update:
            steps.append(("/start_draft_weight_update", None))
            steps += [("/update_weights", {"update_info": self._fill(body, "draft")}) for body in new.draft_update]
            steps.append(("/finish_weight_update", {"draft_version": new.draft_version}))
        return steps

    def _fill(self, body: JsonObject, which: str) -> JsonObject:
        """Put the checkpoint's own folder, as this machine knows it, in the place of a body that names nothing."""
        if body:
            return body
        name = self._engine.model if which == "model" else str(self._engine.draft)
        return {"folder": os.path.abspath(str(find_folder(name)))}

    async def _join(self) -> None:
        """Take the weights of now, and be known to have them."""
        assert self._keeper is not None
        for _ in range(MOST_VERSIONS):
            version: Version = await self._keeper.find.remote(self._name)
            if version.epoch != self._epoch:
                reply = await self._load(as_new(version))
                if reply.error is not None:
                    raise EngineError(f"replica {self._id}: expected weights {version.weight_version}, {reply.error}")
                self._epoch = version.epoch
                if reply.told is not None and reply.told.fault is not None:
                    logger.warning(
                        "replica %s: digests: not compared, as it cannot tell: %s", self._id, reply.told.fault
                    )
            try:
                if await self._keeper.join.remote(self._name, self._id, self._epoch, self._told):
                    return
            except RayTaskError as error:
                raise EngineError(str(error.cause)) from None
        raise EngineError(f"replica {self._id}: expected the weights to stay for a while, got {MOST_VERSIONS} versions")

    async def _wait_until_ready(self) -> None:
        found = functools.partial(self._gateway.server.relay.owner.find, self._name)
        self._owned: OwnedModel | None = found()
        while self._owned is not None and self._owned.state in (State.UNLOADED, State.LOADING):
            await asyncio.sleep(POLL_S)
        self._require_well()

    def _require_well(self) -> None:
        if self._owned is None or self._owned.state is not State.READY:
            state = "none" if self._owned is None else f"one that is {self._owned.state}: {self._owned.cause}"
            raise ReplicaUnwellError(f"replica {self._id}: expected an engine, got {state}")
        if self._owned.loads > 1:
            raise ReplicaUnwellError(f"replica {self._id}: expected the engine that it began with, got another one")

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            with contextlib.suppress(RayError, RayServeException, TimeoutError):
                await asyncio.wait_for(self._keeper.leave.remote(self._name, self._id), LEAVE_S)
        await asyncio.to_thread(self._stack.close)
        if (session := getattr(self, "_session", None)) is not None:
            await session.close()


def make_gateway(name: str, engine: OwnedEngine, replica: str) -> Config:
    """Make the configuration of a replica's gateway: one pinned engine, on the loopback address."""
    table: JsonObject = engine.model_dump(exclude_defaults=True)
    table |= {"pinned": True, "log": str(find_replica_log(replica))}
    tables: JsonObject = {
        "server": {"port": 0, "shutdown_timeout_s": MARGIN_S},
        # Ray counts what a replica has; nothing is turned away behind it.
        "limits": {"max_queued": 1_000_000, "queue_timeout_s": STEP_TIMEOUT_S},
        "models": [{"name": name, "engine": table}],
    }
    return parse_config(tables, f"model {name}")


def as_new(version: Version) -> NewWeights:
    """Whole weights of a version, as an update that brings them; a body that is empty is the checkpoint's own."""
    return NewWeights(
        update=version.update or ({},),
        weight_version=version.weight_version,
        draft_update=version.draft_update,
        draft_version=version.draft_version,
        digests=version.digests,
    )


def read_digests(engine: str, body: str) -> Told:
    """Read what a replica's gateway shows of its one engine, which was started in this way."""
    try:
        (ranks,) = msgspec.json.decode(body, type=dict[str, list[digests.Digests]]).values()
    except (msgspec.DecodeError, ValueError) as error:
        return Told(engine, fault=f"expected the digests of one engine, got {body[:100]!r}: {error}")
    return Told(engine, ranks)


def _pass_on(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Leave out what belongs to one connection; the request's id goes on."""
    return [(name, value) for name, value in headers if name == REQUEST_ID or name not in NOT_FORWARDED]
