"""The admin port's routes for models whose engines the gateway owns: which are in memory, and let them come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

from laguna_serve.serving.gateway.residence.model import OwnedModel
from laguna_serve.serving.gateway.residence.owner import Owner
from laguna_serve.serving.kit.results import JsonObject

Model = Annotated[str, Query(description="its name")]


def describe_model(model: OwnedModel) -> JsonObject:
    """Describe where a model is and what it holds, JSON-ready."""
    return {
        "state": "unloading" if model.leaving and model.state == "ready" else model.state.value,
        "group": model.terms.group,
        "pinned": model.terms.pinned,
        "memory_bytes": model.held_bytes,
        "need_bytes": model.need_bytes,
        "measured": model.measured_bytes is not None,
        "in_flight": model.in_flight,
        "waiting": len(model.waiting),
        "loads": model.loads,
        "wakes": model.wakes,
        "failures": model.failed,
        "evictions": model.evictions,
        "last_load_s": None if model.load_s is None else round(model.load_s, 2),
        "idle_timeout_s": model.terms.idle_timeout_s,
        "cause": model.cause,
    }


def describe_models(owner: Owner) -> JsonObject:
    """Describe all models of the gateway's own, and what their groups have."""
    models = {name: describe_model(model) for name, model in owner.scheduler.models.items()}
    held = dict.fromkeys(owner.scheduler.budgets, 0)
    for model in owner.scheduler.models.values():
        held[model.terms.group] = held.get(model.terms.group, 0) + model.held_bytes
    groups = {name: {"memory_bytes": size, "held_bytes": held[name]} for name, size in owner.scheduler.budgets.items()}
    return {"schema": "laguna_serve.gateway_models/1", "groups": groups, "models": models}


@contextmanager
def hold(owner: Owner, model: OwnedModel | None) -> Iterator[None]:
    """Keep a model where it is for as long as the block runs; None: its engines are not the gateway's own.

    Raises:
        HTTPException: 409 it is not loaded.
    """
    if model is None:
        yield
        return
    if not model.serves:
        raise HTTPException(409, f"The model is not loaded: it is {model.state}. Load it, and pin it, first.")
    ticket = owner.ask(model, 1.0, lambda: None)
    try:
        yield
    finally:
        owner.leave(ticket)


def make_router(find: Callable[[], Owner]) -> APIRouter:
    """Make the routes; `find` gives the owner once the gateway has started."""
    router = APIRouter(prefix="/admin/models")

    def find_model(name: str) -> OwnedModel:
        owner = find()
        if (model := owner.find(name)) is None:
            known = ", ".join(sorted(owner.scheduler.models)) or "none, as no model has an engine of the gateway's own"
            raise HTTPException(404, f"The model {name!r} is not the gateway's to load: those that are: {known}.")
        return model

    @router.get("")
    async def show() -> JsonObject:
        """Models whose engines the gateway owns: where they are, what they hold, who waits."""
        return describe_models(find())

    @router.post("/load")
    async def load(model: Model) -> JsonObject:
        """Load a model when there is room, without a request; one that failed is tried again at once."""
        found = find_model(model)
        find().load(found)
        return describe_model(found)

    @router.post("/unload")
    async def unload(model: Model) -> JsonObject:
        """End its engine when no request is in flight; the next request loads it again."""
        found = find_model(model)
        find().unload(found)
        return describe_model(found)

    @router.post("/pin")
    async def pin(model: Model, pinned: bool = True) -> JsonObject:
        """Keep it in memory, or no more, until the configuration is read again."""
        found = find_model(model)
        find().pin(found, pinned=pinned)
        return describe_model(found)

    return router
