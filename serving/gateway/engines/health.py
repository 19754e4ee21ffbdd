"""Asks every engine again and again whether it is well, and which weights it has; closes what is idle.

Each engine is asked on its own, so that one that is late holds up no other. An engine under load may answer late by
half a minute (vllm#24910, vllm#38157): only several misses in a row count, none while answers to requests come from it,
and an engine that has merely been silent is still tried where a model has no other (engine.py). A connection that is
refused counts at once. An engine that is down is asked more often, so that it is back as soon as it answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Mapping
from typing import Protocol

import aiohttp

from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.engines.engine import LEFT_PAUSED, UNVERSIONED, Engine
from laguna_serve.serving.gateway.engines.pool import VERSION, Pool
from laguna_serve.serving.gateway.wire.failures import BrokenError, UnreachableError

# How often an engine is asked that is not well, and how often it is looked whether that has changed.
RECHECK_S = 0.5
VERSION_TIMEOUT_S = 2.0
# Answers of an engine, or of what is before it, that has no time to say more: 5xx, and these.
BUSY = (408, 429)
# A drafter's version where an engine may have been started again: vLLM tells the model's alone.
UNKNOWN = b"unknown"
logger = logging.getLogger(__name__)


class Checked(Protocol):
    """Whose engines are checked, as of its last configuration."""

    @property
    def config(self) -> Config: ...
    @property
    def pools(self) -> Mapping[str, Pool]: ...

    def has_heard_from(self, engine: Engine, since_s: float) -> bool:
        """Whether a piece of an answer under way has come from the engine since then (`time.perf_counter`)."""

    def note_shortage(self, reason: str) -> None:
        """Note that this machine has run out of something that a connection needs."""


async def check_forever(session: aiohttp.ClientSession, gateway: Checked) -> None:
    """Until cancelled. `session` asks for versions; it keeps no connection."""
    loop = asyncio.get_running_loop()
    checks: dict[Engine, asyncio.Task[float]] = {}
    try:
        while True:
            engines = {engine: pool for pool in gateway.pools.values() for engine in pool.engines}
            for engine in checks.keys() - engines.keys():
                checks.pop(engine).cancel()
            pause_s = RECHECK_S
            for engine, pool in engines.items():
                engine.origin.expire()
                left_s = _find_wait(gateway, engine, checks.get(engine), loop.time())
                if left_s <= 0:
                    checks[engine] = loop.create_task(_check_engine(session, gateway, pool, engine))
                else:
                    pause_s = min(pause_s, left_s)
            await asyncio.sleep(pause_s)
    finally:
        for check in checks.values():
            check.cancel()
        await asyncio.gather(*checks.values(), return_exceptions=True)


async def _check_engine(session: aiohttp.ClientSession, gateway: Checked, pool: Pool, engine: Engine) -> float:
    """Ask once. When that ended, by the loop's clock."""
    try:
        await _check(session, gateway, pool, engine)
    except Exception:
        logger.exception("engine %s: the health check failed in the gateway", engine.name)
    if not (engine.versions_known or engine.is_up(pool.clock())):
        pool.wake_all()  # nobody need wait for what it would have said
    return asyncio.get_running_loop().time()


def _find_wait(gateway: Checked, engine: Engine, last: asyncio.Task[float] | None, now: float) -> float:
    """Seconds until the engine is to be asked; without end while it is being asked."""
    if last is None:
        return 0.0
    return last.result() + _find_interval(gateway, engine) - now if last.done() else math.inf


def _find_interval(gateway: Checked, engine: Engine) -> float:
    """Find how often it is asked: one that is down, could not be connected to, or said no versions, more often."""
    interval_s = gateway.config.health.interval_s
    is_well = engine.healthy is True and engine.versions_known and not engine.misses and not engine.failures
    return interval_s if is_well else min(interval_s, RECHECK_S)


async def _check(session: aiohttp.ClientSession, gateway: Checked, pool: Pool, engine: Engine) -> None:
    health = gateway.config.health
    path = engine.config.health_path or health.path
    began_s, answers = time.perf_counter(), engine.answers
    try:
        status = await engine.origin.ask_status(path, health.timeout_s)
    except (UnreachableError, BrokenError, TimeoutError) as error:
        if isinstance(error, UnreachableError) and error.shortage:
            gateway.note_shortage(str(error))
        elif isinstance(error, TimeoutError) or (isinstance(error, UnreachableError) and error.silent):
            is_alive = engine.answers > answers or gateway.has_heard_from(engine, began_s)
            if not (is_alive or pool.paused):  # an engine that loads weights may be silent
                reason = f"{path}: no answer within {health.timeout_s:g} s"
                engine.note_miss(reason, health.failures, silent=True)
        else:
            enough = 1 if isinstance(error, UnreachableError) and error.refused else health.failures
            engine.note_miss(f"{path}: {error}", enough, silent=False)
        return
    if status != 200:
        engine.note_miss(f"{path}: HTTP {status}", health.failures, silent=False)
        return
    was_up = engine.healthy is True and engine.is_up(pool.clock())
    # One that was started again between two checks looks well, and has the checkpoint's weights.
    asked = not was_up or pool.updated or not engine.versions_known or engine.versions != UNVERSIONED
    if asked and not await _check_version(session, pool, engine, was_up=was_up):
        return
    # Before it counts as well: one that is paused would be given requests in between.
    is_paused = not was_up and await _is_paused(session, engine)
    engine.note_well()
    if not was_up:
        if is_paused and not pool.paused:
            engine.fence(engine.fenced or LEFT_PAUSED)
        elif engine.fenced == LEFT_PAUSED:
            engine.unfence()
        pool.welcome(engine)


async def _check_version(session: aiohttp.ClientSession, pool: Pool, engine: Engine, *, was_up: bool) -> bool:
    """Take over what an engine says of its weights, or fence it off: after an update it may have older ones.

    One that was up is asked twice, as an update may be about to end. Returns whether it is known well enough to serve.
    """
    for last in (False, True) if was_up else (True,):
        expected = pool.versions
        version = await _read_version(session, engine)
        if pool.paused or pool.versions != expected:
            return was_up  # one that has come is asked again when requests go on
        if version is None:
            engine.versions_known = engine.versions_known and was_up  # one that was away may have been started again
            return was_up or not pool.updated
        if not engine.versions_known:
            pool.note_versions_known(engine)
        if was_up and not version:
            return True
        if not pool.updated:
            _take_versions(engine, version.encode() or UNVERSIONED[0], engine.versions[1])
            return True
        if version == expected[0].decode():
            # Of one that was away nobody can say which drafter it has.
            is_unsure = engine.refused and expected[1] != UNVERSIONED[1]
            _take_versions(engine, expected[0], UNKNOWN if is_unsure else engine.versions[1])
            return True
        if last:
            found = version or "none that it would tell"
            engine.fence(f"weights: expected version {expected[0].decode()}, got {found}")
        else:
            await asyncio.sleep(RECHECK_S)
    return True


def _take_versions(engine: Engine, weights: bytes, draft: bytes) -> None:
    """Take over versions where they are others: streams under way are told of every new pair."""
    if engine.versions != (weights, draft):
        engine.versions = (weights, draft)


async def _is_paused(session: aiohttp.ClientSession, engine: Engine) -> bool:
    """Whether an engine holds requests back; no where it does not tell."""
    url, options = f"{engine.config.url}/is_paused", engine.config.request_options()
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=VERSION_TIMEOUT_S), **options) as response:
            return response.status == 200 and (await response.json())["is_paused"] is True
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError):
        return False


async def _read_version(session: aiohttp.ClientSession, engine: Engine) -> str | None:
    """Read the version of an engine's weights: "" from one that does not tell, None where it does not answer.

    Only engines with VLLM_SERVER_DEV_MODE=1 tell, and only those can be updated.
    """
    timeout = aiohttp.ClientTimeout(total=VERSION_TIMEOUT_S)
    url, options = f"{engine.config.url}/weight_info", engine.config.request_options()
    try:
        async with session.get(url, timeout=timeout, **options) as response:
            if response.status >= 500 or response.status in BUSY:
                return None
            version = str((await response.json())["weight_version"]) if response.status == 200 else ""
    except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError):
        return ""
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
    return version if re.fullmatch(VERSION, version) else ""
