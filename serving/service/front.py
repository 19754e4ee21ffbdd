"""The gateway in front of the engine of `laguna serve`.

Its configuration, and what becomes of requests when the engine dies and comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from laguna_serve.serving.engine.keeper import Death
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.planning.engine_config import DEFAULT_PORT
from laguna_serve.serving.planning.launch import EngineError, find_port, require_port
from laguna_serve.serving.service.api_keys import describe_keys

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.config import Config
    from laguna_serve.serving.gateway.engines.engine import Engine
    from laguna_serve.serving.gateway.engines.pool import Pool
    from laguna_serve.serving.gateway.relay.relay import Relay
    from laguna_serve.serving.gateway.run import Background
    from laguna_serve.serving.gateway.server import GatewayServer

UPSTREAM = "engine"
# The engine's address while there is none.
PLACEHOLDER = "http://127.0.0.1:1"
# The engine queues by itself, and better: it batches what waits.
QUEUE_FACTOR = 8
# What streams get to finish after Ctrl-C; a second one ends them.
DRAIN_S = 10.0
# Requests wait for an engine that is started again, which takes a large model minutes.
QUEUE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The gateway's part of the command line.

    Attributes:
        model: the engine's model, by its name in requests.
        max_num_seqs: the engine's.
        file: a whole gateway configuration, to which the engine is added.
        host, port: where to listen; None: the file's, else the defaults.
        keys: of clients, beside the file's.
        origins: of pages in browsers that may ask, instead of the file's.
        temperature: of requests that state none, where that is known.
    """

    model: str
    max_num_seqs: int
    file: Path | None = None
    host: str | None = None
    port: int | None = None
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    temperature: float | None = None


def make_config(settings: FrontSettings, engine_url: str) -> Config:
    """Make the gateway's configuration with the engine at an address in it.

    Raises:
        EngineError: it cannot be read, or does not go together with the rest of the command line.
    """
    from laguna_serve.serving.gateway.config import ConfigError, parse_config
    from laguna_serve.serving.gateway.config.listening import Server

    source = "laguna serve" if settings.file is None else str(settings.file)
    tables = _read_tables(settings.file)
    server: JsonObject = {"port": DEFAULT_PORT, "shutdown_timeout_s": DRAIN_S}
    server |= Server.rename_keys(_table(tables, "server", source))
    server |= {k: v for k, v in (("host", settings.host), ("port", settings.port)) if v is not None}
    if settings.origins:
        server["allowed_origins"] = list(settings.origins)
    limits = {"queue_timeout_s": QUEUE_TIMEOUT_S, **_table(tables, "limits", source)}
    models = _add_engine(_list_tables(tables, "models", source), settings, engine_url, source)
    keys = [*_list_tables(tables, "keys", source), *describe_keys(settings.keys)]
    if server.pop("workers", 1) != 1:
        remedy = "start laguna gateway beside it, and this with --no-gateway"
        raise EngineError(f"{source}: server.workers: expected 1 for the gateway of laguna serve; {remedy}")
    try:
        return parse_config(tables | {"server": server, "limits": limits, "models": models, "keys": keys}, source)
    except ConfigError as error:
        remedy = "; serve with --no-gateway" if settings.file is None else ""
        raise EngineError(f"gateway: {error}{remedy}") from None


def check_front(settings: FrontSettings) -> tuple[str, int, bool]:
    """Everything that can be refused before an engine is started for nothing.

    Returns where the gateway will listen, and whether it asks for a key.

    Raises:
        EngineError: as `make_config`, or the port is taken, or the host none of this machine's.
    """
    config = make_config(settings, PLACEHOLDER)
    host, port = config.server.host, config.server.port
    require_port(host, port) if port else find_port(host)
    return host, port, config.asks_for_keys


class Front:
    """A gateway that runs, with the engine of this process in it. One that `reloads` has a file to read again."""

    _server: GatewayServer

    def __init__(self, settings: FrontSettings, engine_url: str) -> None:
        self.url = self.status = ""
        self.reloads = settings.file is not None
        self._settings, self._engine_url = settings, engine_url

    def open(self, gateway: Background) -> None:
        """Note where it listens, and that its engine comes back after a death."""
        self.url, self.status, self._server = gateway
        self._server.call(self._mark)

    def leave(self, reason: str) -> None:
        """Note that the engine has died: requests wait, streams in flight end with an error."""
        self._server.call(lambda relay: self._find(relay)[1].leave(reason))

    def note_deaths(self, deaths: Collection[Death]) -> None:
        """Why it died, and those before it: for the status page."""
        noted: tuple[JsonObject, ...] = tuple(map(msgspec.to_builtins, deaths))

        def act(relay: Relay) -> None:
            engine = self._find(relay)[1]
            engine.deaths, engine.last_error = noted, noted[-1]["cause"]

        self._server.call(act)

    def succeed(self, engine_url: str) -> None:
        """Another engine serves in its place."""

        def act(relay: Relay) -> None:
            pool, engine = self._find(relay)
            pool.succeed(engine, engine_url)
            self._engine_url = engine_url
            self._server.outdate()  # a file that is being read gets the former engine's address

        self._server.call(act)

    def give_up(self) -> None:
        """Note that the engine does not come back: requests that wait are refused."""

        def act(relay: Relay) -> None:
            pool, engine = self._find(relay)
            pool.give_up(engine)

        self._server.call(act)

    def reload(self) -> None:
        """Read the configuration file again, soon; one that is wrong changes nothing. Safe in a signal handler."""
        self._server.schedule(self._server.reload)

    def read_config(self) -> Config:
        """Read the configuration as it is now. Raises ConfigError."""
        from laguna_serve.serving.gateway.config import ConfigError

        try:
            return make_config(self._settings, self._engine_url)
        except EngineError as error:
            raise ConfigError(str(error)) from None

    def _mark(self, relay: Relay) -> None:
        self._find(relay)[1].returns = True

    def _find(self, relay: Relay) -> tuple[Pool, Engine]:
        pool = relay.pools[self._settings.model]
        return pool, next(engine for engine in pool.engines if engine.name == UPSTREAM)


@contextmanager
def open_front(settings: FrontSettings, engine_url: str) -> Iterator[Front]:
    """Open the gateway for as long as the block runs. Raises EngineError."""
    # FastAPI and aiohttp take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.run import open_background

    front = Front(settings, engine_url)
    with open_background(make_config(settings, engine_url), front.read_config) as gateway:
        front.open(gateway)
        yield front


def _read_tables(file: Path | None) -> JsonObject:
    if file is None:
        return {}
    from laguna_serve.serving.gateway.config.key_file import parse_toml

    try:
        if file.exists() and not file.is_file():  # a pipe is empty the second time, and its keys are gone
            expected = "expected a regular file, as it is read more than once, got something else"
            raise EngineError(f"--gateway-config {file}: {expected}; write the configuration into one")
        return parse_toml(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        got = error.strerror or error
        raise EngineError(f"--gateway-config {file}: expected a file, got {got}; check the path") from None
    except ValueError as error:
        raise EngineError(f"--gateway-config {file}: expected TOML, got {error}; fix the file") from None


def _table(tables: JsonObject, name: str, source: str) -> JsonObject:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise EngineError(f"{source}: {name}: expected a table, got {table!r}; write [{name}]")
    return table


def _list_tables(tables: JsonObject, name: str, source: str) -> list[JsonObject]:
    listed = tables.get(name, [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise EngineError(f"{source}: {name}: expected tables, got {listed!r}; write [[{name}]]")
    return listed


def _add_engine(models: list[JsonObject], settings: FrontSettings, url: str, source: str) -> list[JsonObject]:
    """Add our engine to the model that it serves, which need not be there, nor have another engine."""
    names = [
        upstream.get("name")
        for model in models
        for kind in ("upstreams", "shadows")
        for upstream in _list_tables(model, kind, source)
    ]
    if UPSTREAM in names:
        expected = f"expected no upstream called {UPSTREAM!r} beside the one that laguna serve starts"
        raise EngineError(f"{source}: {expected}, got one; rename it")
    ours: JsonObject = {"name": UPSTREAM, "url": url, "max_in_flight": QUEUE_FACTOR * settings.max_num_seqs}
    ours["default_temperature"] = settings.temperature
    for model in models:
        if model.get("name") != settings.model and not (model.get("upstreams") or model.get("engine")):
            expected = f"expected upstreams, or the name of the model that is served here, {settings.model!r}"
            raise EngineError(
                f"{source}: model {model.get('name')!r}: {expected}; give its name as --served-model-name"
            )
    if all(model.get("name") != settings.model for model in models):
        return [{"name": settings.model, "upstreams": [ours]}, *models]
    return [
        {**model, "upstreams": [*model.get("upstreams", []), ours]} if model.get("name") == settings.model else model
        for model in models
    ]
