"""Asks every engine again and again whether it is well, and which weights it has; closes what is idle."""

from __future__ import annotations

import asyncio
import re

import aiohttp

from laguna_serve.serving.gateway.pool import VERSION, Engine, Pool
from laguna_serve.serving.gateway.relay import Relay

EVERY_S = 2.0
TIMEOUT_S = 2.0


async def check_forever(session: aiohttp.ClientSession, relay: Relay) -> None:
    """Until cancelled."""
    while True:
        pools = list(relay.pools.values())
        for engine in (engine for pool in pools for engine in pool.engines):
            engine.origin.expire()
        await asyncio.gather(*(_check(session, pool, engine) for pool in pools for engine in pool.engines))
        await asyncio.sleep(EVERY_S)


async def _check(session: aiohttp.ClientSession, pool: Pool, engine: Engine) -> None:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with session.get(f"{engine.config.url}/health", timeout=timeout) as response:
            healthy = response.status == 200
            reason = f"/health: HTTP {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        healthy, reason = False, f"/health: expected an answer, got {type(error).__name__}"
    was_up = engine.healthy is True and engine.is_up(pool.clock())
    engine.healthy = healthy
    if not healthy:
        engine.last_error = reason
        return
    engine.note_success()
    if not was_up:
        await _read_version(session, pool, engine)
        pool.welcome(engine)


async def _read_version(session: aiohttp.ClientSession, pool: Pool, engine: Engine) -> None:
    """An engine that has come (back): after an update it may have weights from before. Only engines with
    VLLM_SERVER_DEV_MODE=1 tell, and only those can be updated."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with session.get(f"{engine.config.url}/weight_info", timeout=timeout) as response:
            version = str((await response.json())["weight_version"]) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError):
        version = None
    if pool.paused or version is None or not re.fullmatch(VERSION, version):
        return
    expected = pool.versions[0].decode()
    if not pool.updated:
        engine.versions = (version.encode(), engine.versions[1])
    elif version != expected:
        engine.fence(f"weights: expected version {expected}, got {version}")
