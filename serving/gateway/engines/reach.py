"""From a request to a connection that takes it.

That takes a slot of an engine, and another engine where the first one cannot be reached, so that none runs twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Protocol

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.weight_policy import WeightPolicy
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.failures import UnreachableError
from laguna_serve.serving.gateway.wire.http1 import Connection

# Before a request is sent to another engine: so that those of an engine that died do not arrive there all at once.
RETRY_PAUSE_S = 0.02
# Larger requests go on connections of their own: on a kept one, whose end may be under way, a request is remembered
# until its answer begins.
MAX_REMEMBERED_BYTES = 1 << 20


class Request(Protocol):
    """A request that wants to be sent.

    `engine` is the one whose slot it has, `arrived_s` when it got it, `cause` what kept it from the last one.
    """

    engine: Engine | None
    affinity: bytes | None
    priority: int
    policy: WeightPolicy | None
    arrived_s: float
    cause: str | None


def take_kept(engine: Engine, size: int) -> Connection | None:
    """Take an idle connection to the engine, where a request with a body of this size may use one."""
    return engine.origin.take() if size <= MAX_REMEMBERED_BYTES else None


async def reach(request: Request, pool: Pool, size: int, *, afresh: bool = False) -> Connection:
    """Wait for a slot, where the request has none yet, and for a connection.

    It is a new one if `afresh`, or if the body has too many bytes (`size`) to be remembered.

    Raises:
        GatewayError: 503 no engine is up or has such weights, 429 the queue is full, 408 no slot in time, 502 none
            could be reached.
    """
    tried = set[Engine]()
    deadline = pool.clock() + pool.limits.queue_timeout_s
    while True:
        if request.engine is None:
            request.engine = await pool.acquire(
                request.affinity, frozenset(tried), deadline, request.priority, request.policy
            )
        engine = request.engine
        request.arrived_s = time.perf_counter()
        try:
            kept = None if afresh else take_kept(engine, size)
            return kept or await engine.origin.connect(pool.limits.connect_timeout_s)
        except UnreachableError as error:
            pool.release(engine)
            request.engine, request.cause = None, f"{engine.name}: {error}"
            if error.shortage:
                raise errors.out_of_descriptors() from None
            if engine.returns and not error.silent:
                engine.note_unreachable(str(error))
                continue
            engine.note_failure(str(error), pool.clock(), silent=error.silent)
            tried.add(engine)
            if tried.issuperset(pool.engines) or not pool.may_retry():
                raise errors.engine_unreachable() from None
            await asyncio.sleep(random.uniform(0, RETRY_PAUSE_S))
