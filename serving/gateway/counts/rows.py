"""Whose rows of the board (board.py) there are, and by which names."""

from __future__ import annotations

from laguna_serve.serving.gateway.config import Config

BACKLOG = "backlog"


def name_key(name: str) -> str:
    """Name a key's row."""
    return f"key {name}"


def name_model(name: str) -> str:
    """Name the row of a model's queue."""
    return f"model {name}"


def name_engine(name: str, url: str) -> str:
    """Name an engine's row: by its address, too, as another one may come under its name."""
    return f"engine {name} {url}"


def list_rows(config: Config) -> list[str]:
    """List the rows that a configuration needs."""
    models = [name_model(model.name) for model in config.models]
    engines = [name_engine(engine.name, engine.url) for model in config.models for engine in model.upstreams]
    return [BACKLOG, *models, *engines, *(name_key(key.name) for key in config.all_keys)]
