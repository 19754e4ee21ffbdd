"""``laguna serve``: one engine behind the gateway, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from laguna_serve.serving.chat.vendor_defaults import ChatOptions, add_chat_options, describe_chat
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.engine import Engine, EngineConfig, EngineError
from laguna_serve.serving.planning.inspection import LOOPBACK
from laguna_serve.serving.planning.launch import find_port, plan_launch, require_device, require_port
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.report import describe_plan, format_plan
from laguna_serve.serving.service.api_keys import read_keys
from laguna_serve.serving.service.front import DEFAULT_HOST, DEFAULT_PORT, FrontSettings, check_front
from laguna_serve.serving.service.service import serve
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING, add_draft_sampling
from laguna_serve.serving.speculation.gamma_store import find_advice

AUTO = "auto"
EPILOG = """examples:
  laguna serve poolside/Laguna-XS.2
  laguna serve tests/toy/teacher --draft tests/toy/dflash --gamma max --port 8001
  laguna serve tests/toy/teacher --eager -- --max-num-batched-tokens 4096    (the rest goes to vLLM)

When the engine dies, the cause is told and it is started again after 1 s, then 2, 4, … up to 60 s; five failures in a
row, each within five minutes of a start, and it is given up. Requests that wait, and new ones, go to the new engine;
streams under way end with an error. Its log is moved to LOG.1, an earlier one to LOG.2, up to LOG.5. After an update of
its weights (--weight-updates) the new engine has the checkpoint's again, and gets nothing before the next update.
An engine that is alive and silent is left alone, as a long prompt or a compilation looks the same: the status page
shows it as down, and once you kill its processes it is started again.

Bounds on requests, each answered with a 400: n and beams up to 128 (VLLM_MAX_N_SEQUENCES changes it); 1,000 properties
in an object of a schema; repetitions and counts up to 100,000 in what xgrammar leaves to llguidance, 1,000 to outlines.
On a GPU vLLM refuses logit_bias and min_p beside a drafter; on a CPU they work, and a seed gives the same tokens with
and without one.

exit status: 0 after Ctrl-C, 1 when the engine died and was not started again, 2 when it could not be started at first
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
    add_model_options(parser)
    parser.add_argument("--host", help=f"address to listen on (default: {DEFAULT_HOST})")
    parser.add_argument("--port", type=int, help=f"0 picks a free one (default: {DEFAULT_PORT})")
    parser.add_argument("--served-model-name", help="name in requests (default: the folder's name or the hub id)")
    exact = "kernels under which greedy output depends on the prompt alone, not on batching or speculation; checked at"
    exact += " the start, and refused where the engine has none (costs and limits: docs/speculation.md)"
    parser.add_argument("--exact", action="store_true", help=exact)
    updates = (
        "new weights may come from folders while it serves, through the gateway's admin port (docs/rl.md); not with"
    )
    updates += " --no-gateway beyond the loopback address, as vLLM's development routes ask for no key"
    parser.add_argument("--weight-updates", action="store_true", help=updates)
    gateway = "the bare engine, without the gateway that otherwise stands in front of it"
    parser.add_argument("--no-gateway", action="store_true", help=gateway)
    file = "the gateway's whole configuration (laguna gateway --example); the engine is added to the model of its"
    file += " name; SIGHUP reads it again, and without a file ends the server; --host, --port and --allow-origin go"
    file += " before it"
    parser.add_argument("--gateway-config", type=Path, metavar="FILE", help=file)
    key = "clients must give it; repeatable; @FILE has one per line; default: $LAGUNA_API_KEY, else $VLLM_API_KEY."
    key += " A key on the command line is seen by this machine's users, one in a file or the environment is not"
    parser.add_argument("--api-key", metavar="KEY|@FILE", action="append", default=[], help=key)
    origin = "a web page's origin (https://host) from which browsers may ask, * for all; repeatable"
    parser.add_argument("--allow-origin", metavar="ORIGIN", action="append", default=[], help=origin)
    restart = "start an engine that died again, behind the gateway, whose requests wait meanwhile (default: on)"
    parser.add_argument("--restart", action=argparse.BooleanOptionalAction, default=True, help=restart)
    dry = "say what would be started, as `laguna doctor MODEL` does, and start nothing; exit status 2 if it cannot be"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="vLLM's log (default: in the user's cache folder, by port)")
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides how a model is loaded and what it takes."""
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
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, … (default: the checkpoint's)")
    parser.add_argument(
        "--max-model-len", type=int, help="longest sequence in tokens (default: the model's, on a GPU what fits)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences together (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=float, help="size of the KV cache (default: from the free memory)")
    parser.add_argument("--eager", action="store_true", help="no compilation: quick to start, slow to run")
    parser.add_argument("--no-prefix-caching", action="store_true", help="do not reuse equal prompt beginnings")
    add_chat_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM; the last line on stdout is a JSON object."""
    config, settings, api_key = read_config(args), None, None
    keys = read_keys(args.api_key, os.environ)
    if args.no_gateway:
        config, api_key = bare_config(args, config, keys), next(iter(keys), None)
        host, port, locked = config.host, config.port, api_key is not None
    else:
        settings = FrontSettings(
            model=config.model_name,
            max_num_seqs=config.max_num_seqs,
            file=args.gateway_config,
            host=args.host,
            port=args.port,
            keys=keys,
            origins=tuple(args.allow_origin),
        )
        config = replace(config, host=LOOPBACK[0], port=None)
        host, port, locked = check_front(settings)
    if host not in LOOPBACK and not locked:
        print(f"warning: {host}: everybody who can reach it may ask; give --api-key", file=sys.stderr)
    if args.dry_run:
        return rehearse(config, api_key)
    log_path = args.log or default_log_path(port or 0)
    return serve(config, settings, api_key, log_path, restart=args.restart, greet=format_greeting)


def rehearse(config: EngineConfig, api_key: str | None) -> int:
    """Everything that is checked before a start, and the plan; nothing is started."""
    plan = make_plan(config, require_device())
    try:
        plan = replace(plan, command=tuple(plan_launch(config, api_key).command))
    except EngineError as error:  # the plan may have said so already
        refusals = tuple(dict.fromkeys((*plan.refusals, str(error))))
        plan = replace(plan, command=(), refusals=refusals)
    print(format_plan(plan))
    print(json.dumps(describe_plan(plan)))
    return 2 if plan.refusals else 0


def bare_config(args: argparse.Namespace, config: EngineConfig, keys: Sequence[str]) -> EngineConfig:
    """The engine without the gateway: at a port that stays the same when it is started again.

    Raises:
        CheckpointError: what only the gateway does was asked for.
    """
    if args.gateway_config is not None:
        raise CheckpointError("--gateway-config: expected the gateway, got --no-gateway beside it; drop one")
    if len(keys) > 1:
        remedy = "keep one, or leave --no-gateway out"
        raise CheckpointError(
            f"--api-key: expected one key with --no-gateway, as vLLM takes, got {len(keys)}; {remedy}"
        )
    origins = ("--allowed-origins", json.dumps(args.allow_origin)) if args.allow_origin else ()
    port = find_port(config.host) if config.port is None else require_port(config.host, config.port)
    return replace(config, port=port, extra_args=(*config.extra_args, *origins))


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
        host=args.host or DEFAULT_HOST,
        port=DEFAULT_PORT if args.port is None else args.port or None,
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
