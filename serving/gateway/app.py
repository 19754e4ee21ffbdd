"""The gateway's application: `/health`, `/ready`, `/metrics`, and everything else relayed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import aiohttp
from fastapi import FastAPI, Response

from laguna_serve.serving.gateway.access_log import AccessLog
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.exposition import merge
from laguna_serve.serving.gateway.metrics import Metrics
from laguna_serve.serving.gateway.pool import Engine, Pool
from laguna_serve.serving.gateway.relay import Relay
from laguna_serve.serving.gateway.shadow import Shadows

HEALTH_EVERY_S = 2.0
HEALTH_TIMEOUT_S = 2.0
# vLLM's HTTP server closes an idle connection after 5 s; reusing one about to be closed fails the request.
KEEPALIVE_S = 3.0


def create_app(config: Config, log: AccessLog | None = None) -> FastAPI:
    """The application of a configuration; `log` stands in for stderr. `app.state.relay` is set when it has started."""
    metrics = Metrics()
    if log is None:
        log = AccessLog.on_stderr() if config.server.access_log else AccessLog()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_session() as session:
            shadows = Shadows(session, metrics.registry)
            relay = Relay(config, session, metrics, shadows, log)
            metrics.watch(relay)
            app.state.relay, app.state.session = relay, session
            app.mount("/", relay)
            checks = asyncio.create_task(_check_forever(session, relay))
            try:
                yield
            finally:
                checks.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await checks
                await shadows.stop()

    app = FastAPI(title="Laguna gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        """The gateway itself is alive."""
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        """Every model has an engine that is up, and the gateway is not about to stop."""
        relay: Relay = app.state.relay
        now = time.monotonic()
        pools = relay.pools.values()
        up = all(any(engine.healthy and engine.is_up(now) for engine in pool.engines) for pool in pools)
        return Response(status_code=200 if up and not relay.draining else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus: the gateway's own, then those of every engine that answers."""
        relay: Relay = app.state.relay
        engines = [(pool.model.name, engine) for pool in relay.pools.values() for engine in pool.engines]
        texts = await asyncio.gather(*(_read_metrics(app.state.session, engine) for _, engine in engines))
        found = {(model, e.config.name): text for (model, e), text in zip(engines, texts, strict=True) if text}
        return Response(metrics.render() + merge(found).encode(), media_type="text/plain; version=0.0.4")

    return app


def _open_session() -> aiohttp.ClientSession:
    """Bytes stay as they are: nothing decompressed, no cookies kept; no redirect is followed (relay.py)."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())


async def _read_metrics(session: aiohttp.ClientSession, engine: Engine) -> str:
    """An engine's metrics, or nothing."""
    timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
    try:
        async with session.get(f"{engine.config.url}/metrics", timeout=timeout) as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError):
        return ""


async def _check_forever(session: aiohttp.ClientSession, relay: Relay) -> None:
    while True:
        pools = list(relay.pools.values())
        await asyncio.gather(*(_check(session, pool, engine) for pool in pools for engine in pool.engines))
        await asyncio.sleep(HEALTH_EVERY_S)


async def _check(session: aiohttp.ClientSession, pool: Pool, engine: Engine) -> None:
    timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
    try:
        async with session.get(f"{engine.config.url}/health", timeout=timeout) as response:
            healthy = response.status == 200
            reason = f"/health: HTTP {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        healthy, reason = False, f"/health: {type(error).__name__}"
    was_up = engine.healthy is True and engine.is_up(pool.clock())
    engine.healthy = healthy
    if not healthy:
        engine.last_error = reason
        return
    engine.note_success()
    if not was_up:
        pool.welcome(engine)
