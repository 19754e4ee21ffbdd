"""`laguna gateway`: one endpoint in front of engines, until a signal ends it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from laguna_serve.serving.kit.cli import COULD_NOT_RUN, HELD, print_line
from laguna_serve.serving.kit.flags import Flag, read_flags
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.machine.memory import GIB, show_size
from laguna_serve.serving.supervision.service_manager import tell_ready

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.config import Config

DESCRIPTION = "One OpenAI-compatible endpoint in front of one or more vLLM engines."
EPILOG = """examples:
  laguna gateway --config gateway.toml
  laguna gateway --upstream http://127.0.0.1:8000 --model teacher --port 8080    (one engine, no file)
  laguna gateway --config gateway.toml --workers 4    (for hundreds of streams: one process has one core)

The status page, and the routes that pause engines and give them new weights, are on the admin port that is printed
(on this machine only, unless the file says otherwise). What the gateway does is written to stderr; an engine of its own
([models.engine]) writes to ~/.cache/laguna-serve/gateway-PORT-NAME.log.

SIGHUP (kill -HUP to the process that is printed; systemctl reload laguna-gateway): read the file again, without
dropping a request; where anything is wrong with it, one line says so and nothing changes. Addresses, certificates'
paths and a few limits are read at the start alone: the line names those that differ.
SIGTERM or Ctrl-C: no new requests, those in flight are finished (server.shutdown_timeout_s); a second one stops at
once.

exit status: 0 after it was stopped, 2 when it could not be started
"""


@dataclass(frozen=True, kw_only=True)
class GatewayCommandConfig:
    """A gateway from a file, or from the engines' addresses alone."""

    config: Annotated[Path | None, Flag("TOML; --example shows every key", metavar="FILE")] = None
    upstream: Annotated[
        tuple[str, ...], Flag("instead of a file: an engine; repeatable", metavar="URL", repeated=True)
    ] = ()
    model: Annotated[str | None, Flag("with --upstream: the model's name in requests", metavar="NAME")] = None
    host: Annotated[str | None, Flag("address to listen on (default: the file's, 127.0.0.1)")] = None
    port: Annotated[int | None, Flag("port, 0 for a free one (default: the file's, 8080)")] = None
    workers: Annotated[
        int | None, Flag("processes that take connections and share all limits (default: the file's, 1)", metavar="N")
    ] = None
    check: Annotated[
        bool, Flag("validate the configuration, the files that it names and the addresses to listen on, and exit")
    ] = False
    example: Annotated[bool, Flag("print a configuration with every key, its default and what it does, and exit")] = (
        False
    )


class GatewayResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.gateway/1"):
    """A configuration that can be served, with its `models`; or a gateway that a signal has ended, with its `url`."""

    outcome: Literal["valid", "stopped"]
    models: tuple[str, ...] | UnsetType = UNSET
    url: str | UnsetType = UNSET


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the last line on stdout is a JSON object."""
    config = read_flags(GatewayCommandConfig, argv, prog="laguna gateway", description=DESCRIPTION, epilog=EPILOG)
    early: list[int] = []
    if config.config is not None and not (config.check or config.example):
        # A reload before there is anything to reload would end it.
        signal.signal(signal.SIGHUP, lambda number, _frame: early.append(number))
    # FastAPI and aiohttp take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.config import ConfigError, read_example

    if config.example:
        print(read_example(), end="")
        return HELD
    try:
        result = check_gateway(config) if config.check else run_gateway(config, early)
    except ConfigError as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    print_line(to_json(result))
    return HELD


def check_gateway(config: GatewayCommandConfig) -> GatewayResult:
    """Whether it could be served.

    Raises:
        ConfigError, CheckpointError, EngineError: something is wrong with the configuration, an address is taken, a
            file of usage or traces is none, or the checkpoint of an engine of the gateway's own cannot be served.
    """
    from laguna_serve.serving.gateway.addresses import check_addresses
    from laguna_serve.serving.gateway.app import check_files

    gateway = read_config(config)
    check_addresses(gateway)
    check_files(gateway, make=False)
    check_engines(gateway)
    return GatewayResult(outcome="valid", models=tuple(model.name for model in gateway.models))


def check_engines(gateway: Config) -> None:
    """Check the checkpoints of engines of the gateway's own, and that each could have its group's memory to itself.

    Raises CheckpointError: one cannot be served.
    """
    from laguna_serve.serving.checkpoint import CheckpointError
    from laguna_serve.serving.gateway.residence.plans import (
        check_engine,
        check_foreign_flags,
        make_engine_config,
        plan_bytes,
    )

    budgets = {group.name: group.memory_gib * GIB for group in gateway.groups if group.memory_gib is not None}
    engines = []
    for model in gateway.models:
        if model.engine is not None:
            engines.append(make_engine_config(model.name, model.engine))
            check_engine(engines[-1])
            budget = budgets.get(model.engine.group)
            if budget is not None and (need := plan_bytes(model.name, model.engine)) > budget:
                expected = f"expected {show_size(need)} or more, which {model.name} takes, got {show_size(budget)}"
                raise CheckpointError(f"memory of the group {model.engine.group}: {expected}; raise it")
    check_foreign_flags(engines)


def run_gateway(config: GatewayCommandConfig, early: Sequence[int] = ()) -> GatewayResult:
    """Serve until a signal; `early` are SIGHUPs that have come by then. Raises as `check_gateway`."""
    from laguna_serve.serving.gateway.run import serve

    gateway = read_config(config)
    names = ", ".join(model.name for model in gateway.models)

    def announce(url: str, admin: str) -> None:
        where = f"gateway at {url} for {names}, status at {admin}"
        print(f"{where}  (process {os.getpid()}; Ctrl-C stops it)", flush=True)
        tell_ready()
        if early:  # perhaps after the file had been read
            signal.raise_signal(signal.SIGHUP)

    url = serve(gateway, announce, None if config.config is None else lambda: read_config(config))
    return GatewayResult(outcome="stopped", url=url)


def read_config(config: GatewayCommandConfig) -> Config:
    """Read the configuration of the file or of --upstream; what flags say goes first. Raises ConfigError."""
    from laguna_serve.serving.gateway.config import ConfigError, load_config, parse_config

    if (config.config is None) != bool(config.upstream):
        raise ConfigError("--config or --upstream: expected one of them; see laguna gateway --help")
    server: dict[str, str | int] = {}
    server |= {} if config.host is None else {"host": config.host}
    server |= {} if config.port is None else {"port": config.port}
    server |= {} if config.workers is None else {"workers": config.workers}
    if config.config is not None:
        return load_config(config.config, server)
    upstreams = [{"name": f"engine-{i}", "url": url} for i, url in enumerate(config.upstream)]
    models = [{"name": "model" if config.model is None else config.model, "upstreams": upstreams}]
    return parse_config({"models": models, "server": server}, "--upstream")
