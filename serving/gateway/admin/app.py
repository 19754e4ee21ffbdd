"""The admin application, on a port of its own: the gateway's state and the weights of its engines.

What the gateway is doing is there as JSON and as a page. Steering routes have vLLM's names, and go to all engines of a
model. What it refuses, or cannot do, is an error in OpenAI's form; an update's report says in words what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from laguna_serve.serving.gateway.admin import models, status, usage, weights
from laguna_serve.serving.gateway.admin.refusals import REFUSALS, add_error_handlers, add_guard
from laguna_serve.serving.gateway.admin.services import Services
from laguna_serve.serving.gateway.admin.trl import add_trl
from laguna_serve.serving.gateway.config.listening import Admin


def create_admin_app(find: Callable[[], Services], admin: Admin) -> FastAPI:
    """Create the application beside the gateway's, whose parts `find` gives: it may start later than this one."""
    app = FastAPI(title="Laguna gateway, admin", docs_url=None, redoc_url=None, responses=REFUSALS)
    add_guard(app, admin)
    add_error_handlers(app)
    groups = weights.Groups(find)
    app.include_router(status.make_router(find))
    app.include_router(weights.make_router(groups))
    app.include_router(models.make_router(lambda: find().relay.owner))
    app.include_router(usage.make_router(find))
    app.include_router(weights.make_forwarding_router(groups))
    if admin.trl is not None:
        add_trl(app, admin.trl, find, groups.alone)
    return app
