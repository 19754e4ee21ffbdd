"""What the gateway is doing, for the admin port: as JSON, and as a page."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import Callable, Mapping

import jinja2
import msgspec
from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.admin.models import describe_model
from laguna_serve.serving.gateway.admin.services import Services
from laguna_serve.serving.gateway.admin.usage import describe_use
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.telemetry.exposition import ACCEPTED, DRAFTS, TOKENS, read_metrics, sum_samples
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.workers.merging import add_up_status
from laguna_serve.serving.gateway.workers.peers import Answers
from laguna_serve.serving.kit.results import JsonObject

# Speeds are over the time since the last look, where that is not longer ago.
MOST_AGE_S = 60.0
NO_SPEEDS: Mapping[str, float | None] = {"tok_per_s": None, "acceptance_length": None}


def make_router(find: Callable[[], Services]) -> APIRouter:
    """Make the routes; `find` gives the gateway's parts once it has started."""
    router = APIRouter()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = importlib.resources.files(__package__).joinpath("status.html.j2").read_text(encoding="utf-8")
    template = environment.from_string(page)

    @router.get("/admin/status")
    async def status() -> JsonObject:
        """Engines, load, acceptance, speed, weights and the last errors."""
        return await describe(find(), time.monotonic())

    @router.get("/", response_class=HTMLResponse)
    async def show() -> str:
        """Show the same as a page."""
        found = await describe(find(), time.monotonic())
        return await asyncio.to_thread(template.render, status=found)  # of thousands of keys 0.2 s

    return router


async def describe(services: Services, now: float) -> JsonObject:
    """Everything, JSON-ready; asks the engines for their counters. `now` in seconds of `time.monotonic`."""
    relay = services.relay
    engines = [engine for pool in relay.pools.values() for engine in pool.engines]
    texts = await asyncio.gather(*(read_metrics(services.session, engine.config) for engine in engines))
    own = describe_relay(
        relay, {engine: _find_speeds(engine, text, now) for engine, text in zip(engines, texts, strict=True)}, now
    )
    if services.peers is None:
        return own
    answers = await services.peers.ask("status")
    return add_up_status(own, [msgspec.json.decode(answer) for answer in answers.values()])


def list_answers(relay: Relay, metrics: Metrics) -> Answers:
    """List what other processes of this gateway may ask this one."""

    async def status() -> bytes:
        return msgspec.json.encode(describe_relay(relay, {}, time.monotonic()))

    async def usage() -> bytes:
        return msgspec.json.encode(await describe_use(relay.keys))

    async def show_metrics() -> bytes:
        return await metrics.render()

    return {"status": status, "usage": usage, "metrics": show_metrics}


def describe_relay(relay: Relay, speeds: Mapping[Engine, Mapping[str, float | None]], now: float) -> JsonObject:
    """Describe what this process knows by itself, JSON-ready, with the engines' speeds."""
    relay.refresh()
    models = {
        name: {
            "queued": pool.queued,
            "paused": pool.paused,
            "affinity": pool.model.affinity,
            "upstreams": [_describe_engine(engine, speeds.get(engine, NO_SPEEDS), now) for engine in pool.engines],
            "shadows": [shadow.name for shadow in pool.model.shadows],
            "engine": None if (owned := relay.owner.find(name)) is None else describe_model(owned),
        }
        for name, pool in relay.pools.items()
    }
    return {
        "schema": "laguna_serve.gateway_status/1",
        "draining": relay.leaving or relay.draining,
        "in_flight": len(relay.exchanges),
        "queued_bytes": relay.backlog.total,
        "models": models,
        "keys": [_describe_key(holder) for holder in relay.keys.holders],
        "last_errors": list(relay.last_errors)[::-1],
    }


def _describe_key(holder: Holder) -> JsonObject:
    return {
        "name": holder.name,
        "in_flight": holder.in_flight,
        "max_in_flight": holder.key.max_in_flight,
        "requests_per_minute": holder.key.requests_per_minute,
        "tokens_today": holder.used_today,
        "tokens_per_day": holder.key.tokens_per_day,
        "refused": holder.refused,
    }


def _describe_engine(engine: Engine, speeds: Mapping[str, float | None], now: float) -> JsonObject:
    stats = engine.stats
    state = "up" if engine.is_up(now) else "fenced" if engine.fenced else "down" if engine.refused else "silent"
    state = "restarting" if engine.away and engine.returns else state
    return {
        "name": engine.name,
        "url": engine.config.url,
        "state": state,
        "in_flight": engine.in_flight,
        "max_in_flight": engine.config.max_in_flight,
        "weight": engine.config.weight,
        "requests": sum(stats.first.counts),
        "output_tokens": stats.tokens,
        "ttft_s": stats.first.mean,
        "itl_s": stats.itl.mean,
        **speeds,
        "weight_version": engine.versions[0].decode(),
        "draft_version": engine.versions[1].decode(),
        "last_error": engine.last_error,
        "restarts": engine.restarts,
        "deaths": list(engine.deaths),
    }


def _find_speeds(engine: Engine, text: str, now: float) -> dict[str, float | None]:
    """Tokens per second and per speculative step since the last look, or since the engine's start."""
    found = dict(NO_SPEEDS)
    if not text:
        return found
    sums = sum_samples(text, (TOKENS, DRAFTS, ACCEPTED))
    before, engine.last_scrape = engine.last_scrape, (now, sums)
    if before is not None and 0 < now - before[0] <= MOST_AGE_S and before[1][TOKENS] <= sums[TOKENS]:
        found["tok_per_s"] = (sums[TOKENS] - before[1][TOKENS]) / (now - before[0])
    if sums[DRAFTS]:
        found["acceptance_length"] = 1 + sums[ACCEPTED] / sums[DRAFTS]
    return found
