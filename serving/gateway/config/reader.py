"""Reads a configuration: a TOML file, or tables that were made otherwise.

gateway.example.toml, in the folder above, has every key with its default and what it does (`laguna gateway --example`
prints it).
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from pydantic import ValidationError

from laguna_serve.serving.gateway.config import faults
from laguna_serve.serving.gateway.config.faults import ConfigError
from laguna_serve.serving.gateway.config.key_file import parse_toml
from laguna_serve.serving.gateway.config.tables import Config
from laguna_serve.serving.kit.results import JsonObject

# Of a file: ten thousand models or keys are a tenth of it.
MOST = 1 << 24


def load_config(path: Path, server: JsonObject | None = None) -> Config:
    """Read and validate a file; `server` has what the command line says instead of the file.

    Raises:
        ConfigError: it cannot be read, is no TOML, or a value is not what it must be.
    """
    tables = read_tables(path)
    if server and isinstance(tables.get("server", {}), dict):
        tables["server"] = tables.get("server", {}) | server
    return parse_config(tables, str(path))


def read_tables(path: Path) -> JsonObject:
    """Read a file's tables, not validated. Raises ConfigError: it cannot be read or is no TOML."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST + 1)
    except OSError as error:
        remedy = "check the path, or begin with: laguna gateway --example"
        raise ConfigError(f"{path}: expected a configuration, got {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected TOML, got {error}; fix the file") from None
    if len(text) > MOST:  # a device has no end
        raise ConfigError(f"{path}: expected a configuration of at most {MOST:,} characters, got more; check the path")
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: expected TOML, got {error}; fix the file") from None


def parse_config(tables: JsonObject, source: str) -> Config:
    """Validate tables that were read from `source`. Raises ConfigError, which names all that is wrong."""
    try:
        return Config.model_validate(tables, context={})
    except ValidationError as error:
        raise ConfigError(faults.describe(error, Config, source)) from None


def read_example() -> str:
    """Read the example configuration, which has every key."""
    return (
        importlib.resources.files("laguna_serve.serving.gateway")
        .joinpath("gateway.example.toml")
        .read_text(encoding="utf-8")
    )
