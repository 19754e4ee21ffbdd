"""The gateway's application: `/health`, `/ready`, `/metrics`, and everything else relayed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from fastapi import FastAPI, Request, Response

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.admin.services import Services, find_services
from laguna_serve.serving.gateway.admin.status import list_answers
from laguna_serve.serving.gateway.clients.asgi import RelayApp
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.config.telemetry import Traces, Tracing
from laguna_serve.serving.gateway.counts.counts import Counts
from laguna_serve.serving.gateway.engines.catalog import Catalog
from laguna_serve.serving.gateway.engines.health import check_forever
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.relay.shadow import Shadows
from laguna_serve.serving.gateway.telemetry.access_log import AccessLog
from laguna_serve.serving.gateway.telemetry.copies import Copies
from laguna_serve.serving.gateway.telemetry.exposition import merge, read_metrics
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.telemetry.stages import Tracer
from laguna_serve.serving.gateway.traces.recorder import TraceRecorder
from laguna_serve.serving.gateway.traces.store import TraceFile, TraceFileError
from laguna_serve.serving.gateway.wire.cors import CorsMiddleware
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.workers.merging import join_metrics
from laguna_serve.serving.gateway.workers.team import Team

OWN_PATHS = frozenset(("/health", "/ready", "/metrics"))


def create_app(config: Config, log: AccessLog | None = None, team: Team | None = None) -> FastAPI:
    """Create the application of a configuration, which logs to `log` instead of stderr.

    Once it has started, `find_services` has its parts. In one of several processes `team` is what they share.

    Raises:
        EngineError: the file of usage or of traces is none, or OpenTelemetry is not installed.
    """
    metrics = Metrics()
    ledger = open_ledger(config)
    copies = Copies()
    recorder = TraceRecorder(open_traces(config.traces), metrics.registry, copies)
    tracer = None if config.tracing.endpoint is None else open_tracer(config.tracing)
    if log is None:
        log = AccessLog.on_stderr() if config.server.access_log else AccessLog()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_session() as session, _open_session(force_close=True) as steps:
            shadows = Shadows(session, metrics.registry, copies, recorder.accompany if config.traces.file else None)
            catalog = Catalog(steps)
            shared = None if team is None else team.make_counts()
            counts = Counts() if shared is None else shared
            relay = Relay(config, metrics, shadows, log, catalog, ledger, tracer, counts)
            app.state.services = Services(relay, session, steps, None if team is None else team.peers)
            app.mount("/", RelayApp(relay))
            checks = asyncio.create_task(check_forever(steps, relay))
            stopped = asyncio.Event()
            writing = asyncio.gather(
                ledger.keep_writing(config.access.usage_write_s, stopped), recorder.keep_writing(stopped)
            )
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if team is not None and shared is not None:
                        await stack.enter_async_context(team.work(shared, list_answers(relay, metrics)))
                    yield
            finally:
                checks.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await checks
                relay.close()
                await relay.owner.stop()
                await shadows.stop()
                await catalog.stop()
                stopped.set()
                await writing
                if tracer is not None:
                    await asyncio.to_thread(tracer.close)

    app = FastAPI(title="Laguna gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(CorsMiddleware, paths=OWN_PATHS, find=lambda: find_services(app).relay.cors)

    @app.exception_handler(GatewayError)
    async def refuse(request: Request, error: GatewayError) -> Response:
        headers = {name.decode(): value.decode() for name, value in error.headers()}
        return Response(error.body(request.url.path), error.status, headers)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """Say that the gateway itself is alive."""
        return Response(status_code=200)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        """Every model has an engine that is up or that can be started, and the gateway is not about to stop.

        It needs no key, as probes of balancers have none.
        """
        relay = find_services(app).relay
        now = time.monotonic()
        up = all(pool.is_ready(now) or relay.owner.is_well(name) for name, pool in relay.pools.items())
        return Response(status_code=200 if up and not (relay.leaving or relay.draining) else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def show_metrics(request: Request) -> Response:
        """For Prometheus: the gateway's own, then those of every engine that answers."""
        services = find_services(app)
        services.relay.keys.find(dict(request.headers.raw))
        engines = [(pool.model.name, engine) for pool in services.relay.pools.values() for engine in pool.engines]
        texts = await asyncio.gather(*(read_metrics(services.session, engine.config) for _, engine in engines))
        found = {(model, e.config.name): text for (model, e), text in zip(engines, texts, strict=True) if text}
        services.relay.refresh()
        own = await metrics.render()
        if services.peers is not None:
            others = await services.peers.ask("metrics")
            own = await asyncio.to_thread(join_metrics, services.peers.worker, own, others)
        merged = await asyncio.to_thread(merge, found)  # of hundreds of engines a second's work, while streams go on
        return Response(own + merged.encode(), media_type="text/plain; version=0.0.4")

    return app


def check_files(config: Config, *, make: bool = True) -> None:
    """Make the files of usage and of traces where they are not there; without `make` look at those that are.

    Raises:
        EngineError: one is none of ours.
    """
    usage, traces = config.access.usage_file, config.traces.file
    if make or (usage is not None and Path(usage).exists()):
        open_ledger(config).close()
    if (make or (traces is not None and Path(traces).exists())) and (file := open_traces(config.traces)) is not None:
        file.close()


def open_ledger(config: Config) -> Ledger:
    """Open what was used today. Raises EngineError: the file is none of ours."""
    return Ledger(None if config.access.usage_file is None else Path(config.access.usage_file))


def open_traces(settings: Traces) -> TraceFile | None:
    """Open the file of traces, where one is named. Raises EngineError: it is none."""
    if settings.file is None:
        return None
    try:
        return TraceFile(Path(settings.file), settings.max_bytes)
    except TraceFileError as error:
        raise EngineError(f"traces: {error}") from None


def open_tracer(settings: Tracing) -> Tracer:
    """Open what sends spans. Raises EngineError: OpenTelemetry's SDK is not installed."""
    try:
        from laguna_serve.serving.gateway.telemetry.otel import make_tracer
    except ImportError as error:
        expected = "tracing.endpoint: expected OpenTelemetry's SDK to be installed"
        raise EngineError(f"{expected}, got {error}; pip install 'laguna-serve[tracing]'") from None
    return make_tracer(settings)


def _open_session(force_close: bool = False) -> aiohttp.ClientSession:
    """For everything but the clients' requests: health checks, scrapes, shadows, updates of weights."""
    connector = aiohttp.TCPConnector(limit=0, force_close=force_close)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
