"""The admin port's route for what was used under every key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

import msgspec
from fastapi import APIRouter

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.admin.services import Services
from laguna_serve.serving.gateway.workers.merging import add_up_tallies
from laguna_serve.serving.gateway.workers.peers import Peers
from laguna_serve.serving.kit.results import JsonObject


def make_router(find: Callable[[], Services]) -> APIRouter:
    """Make the route; `find` gives the gateway's parts."""
    router = APIRouter()

    @router.get("/admin/usage")
    async def usage() -> JsonObject:
        """Tell requests, tokens and refusals per key and model, today (UTC) and since the start, and budgets."""
        relay, peers = find().relay, find().peers
        relay.refresh()
        keys = {holder.name: describe_key(holder) for holder in relay.keys.holders}
        if peers is not None:
            await _add_others(keys, relay.keys, peers)
        return {"schema": "laguna_serve.gateway_usage/1", "day": datetime.now(UTC).date().isoformat(), "keys": keys}

    return router


async def _add_others(keys: JsonObject, keyring: Keyring, peers: Peers) -> None:
    """Add what other processes know: what is in the file, and what each could not write."""
    own, answers = await asyncio.gather(describe_use(keyring), peers.ask("usage"))
    parts = [own, *(msgspec.json.decode(answer) for answer in answers.values())]
    written = await asyncio.to_thread(keyring.ledger.read_written)
    for name, key in keys.items():
        same = [part[name] for part in parts if name in part]
        today = {model: asdict(tally) for model, tally in written.get(name, {}).items()}
        key["today"] = add_up_tallies([today, *(part["today"] for part in same)])
        key["since_start"] = add_up_tallies(part["since_start"] for part in same)


async def describe_use(keyring: Keyring) -> JsonObject:
    """Write the file, and describe what was used in this process, JSON-ready.

    That is what no file has of today, and what came since the start.
    """
    for holder in keyring.holders:
        holder.find_today()  # it may be another day than at the last request
    await keyring.ledger.write()
    return {
        holder.name: {
            "today": {model: asdict(tally) for model, tally in keyring.ledger.find_unwritten(holder.name).items()},
            "since_start": {model: asdict(tally) for model, tally in holder.since_start.items()},
        }
        for holder in keyring.holders
    }


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
