"""The admin port's route for what was used under every key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

from fastapi import APIRouter

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.kit.results import JsonObject


def make_router(find: Callable[[], Keyring]) -> APIRouter:
    """Make the route; `find` gives the keys of the gateway of the moment."""
    router = APIRouter()

    @router.get("/admin/usage")
    async def usage() -> JsonObject:
        """Tell requests, tokens and refusals per key and model, today (UTC) and since the start, and budgets."""
        keys = {holder.name: describe_key(holder) for holder in find().holders}
        return {"schema": "laguna_serve.gateway_usage/1", "day": datetime.now(UTC).date().isoformat(), "keys": keys}

    return router


def describe_key(holder: Holder) -> JsonObject:
    """Describe a key's limits and what was used of them, JSON-ready.

    Refusals before the model was known are those of the model "".
    """
    key = holder.key
    return {
        "models": list(key.models),
        "priority": key.priority,
        "max_in_flight": key.max_in_flight,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "tokens_per_day": key.tokens_per_day,
        "in_flight": holder.in_flight,
        "reserved_tokens": holder.reserved,
        "tokens_today": holder.used_today,
        "budget_left_tokens": holder.budget_left,
        "today": {model: asdict(tally) for model, tally in holder.find_today().items()},
        "since_start": {model: asdict(tally) for model, tally in holder.since_start.items()},
    }
