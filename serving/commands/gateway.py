"""``laguna gateway``: the gateway, until it is told to stop."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.config import Config

SCHEMA = "laguna_serve.gateway/1"
EPILOG = """examples:
  laguna gateway --config gateway.toml
  laguna gateway --upstream http://127.0.0.1:8000 --model teacher --port 8080    (one engine, no file)

The status page, and the routes that pause engines and give them new weights, are on the admin port that is printed
(on this machine only, unless the file says otherwise).

SIGHUP: read the file again, without dropping a request; where anything is wrong with it, one line says so and nothing
changes. Addresses, certificates' paths and a few limits are read at the start alone: the line names those that differ.
SIGTERM or Ctrl-C: no new requests, those in flight are finished (server.drain_s); a second one stops at once.

exit status: 0 after it was stopped, 2 when it could not be started
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``laguna gateway``."""
    parser = commands.add_parser(
        "gateway",
        help="one endpoint in front of engines",
        description="One OpenAI-compatible endpoint in front of one or more vLLM engines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; --example shows every key")
    parser.add_argument("--upstream", metavar="URL", action="append", help="instead of a file: an engine; repeatable")
    parser.add_argument("--model", metavar="NAME", help="with --upstream: the model's name in requests")
    parser.add_argument("--host", help="address to listen on (default: the file's, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port, 0 for a free one (default: the file's, 8080)")
    check = "validate the configuration, the files that it names and the addresses to listen on, and exit"
    parser.add_argument("--check", action="store_true", help=check)
    example = "print a configuration with every key, its default and what it does, and exit"
    parser.add_argument("--example", action="store_true", help=example)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; the last line on stdout is a JSON object."""
    # FastAPI and aiohttp take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.addresses import check_addresses
    from laguna_serve.serving.gateway.config import ConfigError, read_example
    from laguna_serve.serving.gateway.server import serve

    if args.example:
        print(read_example(), end="")
        return 0
    try:
        config = read_config(args)
    except ConfigError as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return 2
    models = [model.name for model in config.models]
    if args.check:
        check_addresses(config)
        print(json.dumps({"schema": SCHEMA, "outcome": "valid", "models": models}))
        return 0
    names = ", ".join(models)
    url = serve(
        config,
        lambda url, admin: print(f"gateway at {url} for {names}, status at {admin}  (Ctrl-C stops it)", flush=True),
        None if args.config is None else lambda: read_config(args),
    )
    print(json.dumps({"schema": SCHEMA, "outcome": "stopped", "url": url}))
    return 0


def read_config(args: argparse.Namespace) -> Config:
    """The configuration of the file or of --upstream, in which --host and --port go first. Raises ConfigError."""
    from laguna_serve.serving.gateway.config import ConfigError, load_config, parse_config

    if (args.config is None) == (args.upstream is None):
        raise ConfigError("--config or --upstream: expected one of them; see laguna gateway --help")
    server = {name: value for name in ("host", "port") if (value := vars(args)[name]) is not None}
    if args.config is not None:
        return load_config(args.config, server)
    upstreams = [{"name": f"engine-{i}", "url": url} for i, url in enumerate(args.upstream)]
    models = [{"name": args.model or "model", "upstreams": upstreams}]
    return parse_config({"models": models, "server": server}, "--upstream")
