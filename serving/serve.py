"""``laguna serve``: one engine behind the gateway, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType

from laguna_serve.serving.acceptance import ENOUGH_DRAFTS, Acceptance, format_acceptance, read_acceptance
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.engine import Engine, EngineConfig, EngineError, require_port
from laguna_serve.serving.gamma_store import find_advice
from laguna_serve.serving.speculation import DRAFT_SAMPLING, add_draft_sampling
from laguna_serve.serving.vendor_defaults import ChatOptions, add_chat_options, describe_chat

SCHEMA = "laguna_serve.serve/1"
DEFAULT_PORT = 8000
WATCH_S = 0.5
ACCEPTANCE_S = 5.0
AUTO = "auto"
LOOPBACK = "127.0.0.1"
QUEUE_FACTOR = 8
# What streams get to finish after Ctrl-C; a second one ends them.
DRAIN_S = 10.0
EPILOG = """examples:
  laguna serve poolside/Laguna-XS.2
  laguna serve tests/toy/teacher --draft tests/toy/dflash --gamma max --port 8001
  laguna serve tests/toy/teacher --eager -- --max-num-batched-tokens 4096    (the rest goes to vLLM)

exit status: 0 after Ctrl-C, 1 when the engine died, 2 when it could not be started
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``laguna serve``."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a Laguna model, with a DFlash drafter if one is given, behind an OpenAI-compatible API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("--keep-mask", metavar="M.npy", help="prune a base checkpoint's experts while loading")
    parser.add_argument("--group-indices", metavar="G.npy", help="the mask's groups of atoms")
    draft = "DFlash drafter, in Laguna's or the speculators format: checkpoint folder or hub id"
    parser.add_argument("--draft", metavar="D", help=draft)
    gamma = (
        "tokens proposed per step; max, the default: as many as the drafter was trained for (its block − 1); auto: what"
    )
    gamma += " bench/gamma_sweep.py found for this model, drafter, device and vLLM"
    parser.add_argument("--gamma", type=parse_gamma_or_auto, metavar="N|max|auto", help=gamma)
    add_draft_sampling(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--served-model-name", help="name in requests (default: the folder's name or the hub id)")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, … (default: the checkpoint's)")
    parser.add_argument("--max-model-len", type=int, help="longest sequence in tokens (default: the model's)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences together (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=float, help="size of the KV cache (default: from the free memory)")
    parser.add_argument("--eager", action="store_true", help="no compilation: quick to start, slow to run")
    parser.add_argument("--no-prefix-caching", action="store_true", help="do not reuse equal prompt beginnings")
    exact = "kernels under which greedy output depends on the prompt alone, not on batching or speculation; checked at"
    exact += " the start, and refused where the engine has none (costs and limits: README)"
    parser.add_argument("--exact", action="store_true", help=exact)
    updates = "new weights may come from folders while it serves, through the gateway's admin port (README); not with"
    updates += " --no-gateway beyond the loopback address, as vLLM's development routes ask for no key"
    parser.add_argument("--weight-updates", action="store_true", help=updates)
    add_chat_options(parser)
    gateway = "the bare engine, without the gateway that otherwise stands in front of it"
    parser.add_argument("--no-gateway", action="store_true", help=gateway)
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="vLLM's log (default: in the user's cache folder, by port)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM; the last line on stdout is a JSON object."""
    config = read_config(args)
    log_path = args.log or default_log_path(args.port)
    _handle_signals()
    started = time.monotonic()
    result: dict[str, object] = {"schema": SCHEMA, "outcome": "stopped", "log": str(log_path)}
    if not args.no_gateway and args.port:
        require_port(args.host, args.port)  # before an engine is started for nothing
    behind = config if args.no_gateway else replace(config, host=LOOPBACK, port=None)
    try:
        with (
            Engine(behind, log_path=log_path, announce=_announce) as engine,
            nullcontext((engine.base_url, None)) if args.no_gateway else open_gateway(config, engine) as (url, status),
        ):
            result |= {"url": url, "model": engine.model_name}
            print(format_greeting(engine, url, status), flush=True)
            watch = AcceptanceWatch(engine.base_url, engine.gamma)
            try:
                while True:
                    engine.check()
                    watch.look()
                    time.sleep(WATCH_S)
            except EngineError as error:
                print(f"laguna: error: {error}", file=sys.stderr)
                result["outcome"] = "died"
            except KeyboardInterrupt:
                watch.read()
            result["acceptance"] = watch.describe()
    except KeyboardInterrupt:
        if "url" not in result:
            raise EngineError(f"engine {config.model_name}: interrupted before it was ready; see {log_path}") from None
    print(json.dumps({**result, "uptime_s": round(time.monotonic() - started, 1)}))
    return 1 if result["outcome"] == "died" else 0


def open_gateway(config: EngineConfig, engine: Engine) -> AbstractContextManager[tuple[str, str]]:
    """The gateway in front of the one engine, at the address that was asked for; its URL and its status page's."""
    # FastAPI and aiohttp take half a second to import, which no other command needs.
    from laguna_serve.serving.gateway.config import ConfigError, parse_config
    from laguna_serve.serving.gateway.server import in_background

    # The engine queues by itself, and better: it batches what waits.
    upstream = {"name": "engine", "url": engine.base_url, "max_in_flight": QUEUE_FACTOR * config.max_num_seqs}
    server = {"host": config.host, "port": config.port or 0, "drain_s": DRAIN_S}
    try:
        front = parse_config(
            {"server": server, "models": [{"name": engine.model_name, "upstreams": [upstream]}]}, "laguna serve"
        )
    except ConfigError as error:
        raise EngineError(f"gateway: {error}; serve with --no-gateway") from None
    return in_background(front)


def read_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration from the command line.  Raises CheckpointError when --gamma auto finds nothing."""
    draft, gamma, schedule, sampling = args.draft, args.gamma, None, args.draft_sampling
    if gamma == AUTO:
        if draft is None:
            raise CheckpointError("--gamma auto: expected --draft beside it, got none; name the drafter")
        advice = find_advice(args.model, draft)
        draft, gamma, schedule = (draft, advice.gamma, advice.schedule) if advice.gamma else (None, None, None)
        sampling = DRAFT_SAMPLING[0] if draft is None else sampling
        what = f"γ {gamma}" if draft is not None else "plain decoding is fastest here: the drafter is left out"
        print(f"--gamma auto: {what}, by the sweep of {advice.date}: {list(advice.schedule)}", file=sys.stderr)
    return EngineConfig(
        model=args.model,
        keep_mask=args.keep_mask,
        group_indices=args.group_indices,
        draft=draft,
        gamma=gamma,
        gamma_schedule=schedule,
        draft_sampling=sampling,
        host=args.host,
        port=args.port or None,
        served_model_name=args.served_model_name,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        enforce_eager=args.eager,
        prefix_caching=not args.no_prefix_caching,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
        exact=args.exact,
        weight_updates=args.weight_updates,
        chat=ChatOptions(args.tool_call_parser, args.reasoning_parser, args.thinking),
        extra_args=tuple(args.extra_args),
    )


class AcceptanceWatch:
    """Reads a speculating engine's acceptance now and then, and prints it once it rests on enough drafts."""

    def __init__(self, base_url: str, gamma: int | None) -> None:
        self._base_url, self._gamma = base_url, gamma
        self._last = time.monotonic()
        self._shown = False
        self._seen: Acceptance | None = None

    def look(self) -> None:
        """Called often; asks the engine seldom, and no more once the line is out."""
        if self._gamma is None or self._shown or time.monotonic() - self._last < ACCEPTANCE_S:
            return
        self.read()
        if self._seen is not None and self._seen.drafts >= ENOUGH_DRAFTS:
            print(format_acceptance(self._seen, self._gamma), file=sys.stderr, flush=True)
            self._shown = True

    def read(self) -> None:
        """Asks now; an engine that does not answer leaves what was known."""
        if self._gamma is not None:
            self._seen = read_acceptance(self._base_url) or self._seen
            self._last = time.monotonic()

    def describe(self) -> dict[str, float | int | None] | None:
        """For the JSON line: length and drafts since the engine started; None without speculation."""
        if self._seen is None:
            return None
        length = self._seen.length
        return {"length": None if length is None else round(length, 3), "drafts": self._seen.drafts}


def parse_gamma(text: str) -> int | None:
    """A number of tokens, or "max" (None)."""
    if text == "max":
        return None
    try:
        gamma = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or max, got {text!r}") from None
    if gamma < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 or max, got {gamma}; leave --draft out to serve without")
    return gamma


def parse_gamma_or_auto(text: str) -> int | str | None:
    """A number of tokens, "max" (None), or "auto"."""
    return AUTO if text == AUTO else parse_gamma(text)


def default_log_path(port: int) -> Path:
    """One file per port: a later server on the same port overwrites it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "laguna-serve" / f"serve-{port or os.getpid()}.log"


def format_greeting(engine: Engine, url: str, status: str | None) -> str:
    """Where the server is, what it can do in a chat, how to try it, where its log is."""
    if engine.chat.template:
        question = [{"role": "user", "content": "Write fibonacci(n) in Python."}]
        path, body = "chat/completions", {"model": engine.model_name, "messages": question, "max_tokens": 64}
    else:
        path, body = "completions", {"model": engine.model_name, "prompt": "def fibonacci(n):", "max_tokens": 64}
    return "\n".join(
        (
            f"serving {engine.model_name} at {url}/v1  (Ctrl-C stops it)",
            *([] if status is None else [f"status: {status}"]),
            *describe_chat(engine.chat),
            f"log: {engine.log_path}",
            f"try: curl {url}/v1/{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        )
    )


def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _handle_signals() -> None:
    """Every polite way of ending us becomes a KeyboardInterrupt.

    SIGINT too, as a shell script starts its background jobs with it ignored; SIGHUP not under nohup.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
