"""``laguna gateway``: the gateway, until it is told to stop."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

SCHEMA = "laguna_serve.gateway/1"
EPILOG = """examples:
  laguna gateway --config gateway.toml
  laguna gateway --upstream http://127.0.0.1:8000 --model teacher --port 8080    (one engine, no file)

The status page, and the routes that pause engines and give them new weights, are on the admin port that is printed
(on this machine only, unless the file says otherwise).

SIGHUP: read the file again, without dropping a request.
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
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; keys: serving/gateway/config.py")
    parser.add_argument("--upstream", metavar="URL", action="append", help="instead of a file: an engine; repeatable")
    parser.add_argument("--model", metavar="NAME", help="with --upstream: the model's name in requests")
    parser.add_argument("--host", help="address to listen on (default: the file's, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port, 0 for a free one (default: the file's, 8080)")
    parser.add_argument("--check", action="store_true", help="validate the configuration and exit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; the last line on stdout is a JSON object."""
    # FastAPI and aiohttp take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.config import Config, ConfigError, load_config, parse_config
    from laguna_serve.serving.gateway.server import serve

    try:
        if (args.config is None) == (args.upstream is None):
            raise ConfigError("--config or --upstream: expected one of them; see laguna gateway --help")
        if args.config is not None:
            config: Config = load_config(args.config)
        else:
            upstreams = [{"name": f"engine-{i}", "url": url} for i, url in enumerate(args.upstream)]
            config = parse_config({"models": [{"name": args.model or "model", "upstreams": upstreams}]}, "--upstream")
        server = config.server.model_copy(
            update={name: value for name in ("host", "port") if (value := vars(args)[name]) is not None}
        )
        config = config.model_copy(update={"server": server})
    except ConfigError as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return 2
    models = [model.name for model in config.models]
    if args.check:
        print(json.dumps({"schema": SCHEMA, "outcome": "valid", "models": models}))
        return 0
    names = ", ".join(models)
    path = args.config
    url = serve(
        config,
        lambda url, admin: print(f"gateway at {url} for {names}, status at {admin}  (Ctrl-C stops it)", flush=True),
        None if path is None else lambda: load_config(path),
    )
    print(json.dumps({"schema": SCHEMA, "outcome": "stopped", "url": url}))
    return 0
