"""Several models of one command line: a gateway that owns their engines, within one budget of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.planning.engine_config import DEFAULT_HOST, DEFAULT_PORT, EngineConfig
from laguna_serve.serving.service.api_keys import describe_keys
from laguna_serve.serving.service.front import DRAIN_S

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.config import Config


@dataclass(frozen=True, slots=True)
class SeveralSettings:
    """What is said of all models together.

    Attributes:
        engine: the options of each engine, as `[models.engine]` has them.
        names: of the models in requests, where that is not the folder's name or the hub id.
        memory_gib: what the engines may take together; None: what is free at the start.
        idle_timeout_s: a model goes after so long without requests; None: when its room is needed.
        keys, origins: of clients, and of pages in browsers.
    """

    models: Sequence[str]
    engine: JsonObject
    names: Mapping[str, str]
    memory_gib: float | None = None
    idle_timeout_s: float | None = None
    host: str | None = None
    port: int | None = None
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def make_several_config(settings: SeveralSettings) -> Config:
    """Make the gateway's configuration. Raises EngineError: something does not go together."""
    # FastAPI and pydantic take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.config import ConfigError, parse_config

    server: JsonObject = {
        "host": settings.host or DEFAULT_HOST,
        "port": DEFAULT_PORT if settings.port is None else settings.port,
        "shutdown_timeout_s": DRAIN_S,
        "allowed_origins": list(settings.origins),
    }
    idle = {} if settings.idle_timeout_s is None else {"idle_timeout_s": settings.idle_timeout_s}
    models = [
        {
            "name": settings.names.get(model) or EngineConfig(model=model).model_name,
            "engine": {**settings.engine, "model": model, **idle},
        }
        for model in settings.models
    ]
    size = {} if settings.memory_gib is None else {"memory_gib": settings.memory_gib}
    groups: list[JsonObject] = [{"name": "default", **size}]
    tables: JsonObject = {"server": server, "models": models, "groups": groups, "keys": describe_keys(settings.keys)}
    try:
        return parse_config(tables, "laguna serve")
    except ConfigError as error:
        raise EngineError(str(error)) from None
