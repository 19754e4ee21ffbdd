"""`laguna serve`: one engine behind the gateway, until Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from laguna_serve.serving.chat.sampling_defaults import find_temperature
from laguna_serve.serving.chat.vendor_defaults import describe_chat
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import find_diffusion
from laguna_serve.serving.commands.model_options import ModelOptions, make_engine_config, read_model_flags
from laguna_serve.serving.commands.serve_several import run_several
from laguna_serve.serving.engine import Engine, EngineConfig, EngineError, find_port, require_port
from laguna_serve.serving.engine.hub import describe_models
from laguna_serve.serving.kit.cli import COULD_NOT_RUN, FELL_SHORT, HELD, print_line, print_result
from laguna_serve.serving.kit.flags import MOST_SEED, Flag
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.machine.local_http import LOOPBACK
from laguna_serve.serving.planning.diffusion.plan import format_diffusion, plan_diffusion
from laguna_serve.serving.planning.engine_config import DEFAULT_HOST, DEFAULT_PORT
from laguna_serve.serving.planning.launch import plan_launch, require_device
from laguna_serve.serving.planning.plan import EnginePlan, make_plan
from laguna_serve.serving.planning.report import format_plan
from laguna_serve.serving.planning.result import describe_plan
from laguna_serve.serving.planning.vllm_flags import refuse_unknown_flags
from laguna_serve.serving.service.api_keys import read_keys
from laguna_serve.serving.service.front import FrontSettings, check_front
from laguna_serve.serving.service.service import DIED, serve
from laguna_serve.serving.speculation.adaptive import describe_adaptive
from laguna_serve.serving.supervision.default_logs import find_serve_log

DESCRIPTION = """Serve a Laguna model, with a DFlash drafter if one is given, behind an OpenAI-compatible API.

What stands behind a bare -- goes to the engine unchanged: vLLM's own flags."""
EPILOG = """examples:
  laguna serve poolside/Laguna-XS.2
  laguna serve tests/toy/teacher --draft tests/toy/dflash --gamma max --port 8001
  laguna serve tests/toy/teacher tests/toy/dense --memory-budget 8 --idle-timeout 600    (in turns, on demand)
  laguna serve tests/toy/teacher --eager -- --max-num-batched-tokens 4096    (the rest goes to vLLM)
  laguna serve GSAI-ML/LLaDA-8B-Instruct --draft D -- --cache dual           (the rest goes to the diffusion engine)

When the engine dies, the cause is printed and it is started again after 1 s, then 2, 4 and 8; five failures in a
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


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelOptions):
    """A model to serve, and how."""

    model: Annotated[str, Flag("checkpoint folder or hub id", positional=True)]
    more_models: Annotated[
        tuple[str, ...],
        Flag(
            "further models: each is loaded when it is asked for, and goes when another one needs its room",
            positional=True,
            repeated=True,
            metavar="MODEL",
        ),
    ] = ()
    memory_budget: Annotated[
        float | None,
        Flag(
            "memory that the engines may take together (default: nine tenths of what is free); also for one model,"
            " which is then loaded when it is asked for",
            metavar="GIB",
        ),
    ] = None
    idle_timeout: Annotated[
        float | None,
        Flag(
            "a model goes after so long without requests (default: when its room is needed); also for one",
            metavar="SECONDS",
        ),
    ] = None
    host: Annotated[str | None, Flag(f"address to listen on (default: {DEFAULT_HOST})")] = None
    port: Annotated[int | None, Flag(f"0 picks a free one (default: {DEFAULT_PORT})", at_least=0, at_most=65535)] = None
    served_model_name: Annotated[str | None, Flag("name in requests (default: the folder's name or the hub id)")] = None
    exact: Annotated[
        bool,
        Flag(
            "kernels under which greedy output depends on the prompt alone, not on batching or speculation; checked at"
            " the start, and refused where the engine has none (costs and limits: docs/lossless.md)"
        ),
    ] = False
    weight_updates: Annotated[
        bool,
        Flag(
            "new weights may come from folders while it serves, through the gateway's admin port (docs/rl.md); not with"
            " --no-gateway beyond the loopback address, as vLLM's development routes ask for no key"
        ),
    ] = False
    return_routed_experts: Annotated[
        bool,
        Flag(
            "answers carry, as routed_experts, which experts every token went to, for a trainer to replay (docs/rl.md);"
            " mixtures only"
        ),
    ] = False
    gateway: Annotated[bool, Flag("the bare engine, without the gateway that otherwise stands in front of it")] = True
    gateway_config: Annotated[
        Path | None,
        Flag(
            "the gateway's whole configuration (laguna gateway --example); the engine is added to the model of its"
            " name; SIGHUP reads it again, and without a file ends the server; --host, --port and --allow-origin go"
            " before it",
            metavar="FILE",
        ),
    ] = None
    api_key: Annotated[
        tuple[str, ...],
        Flag(
            "clients must give it; repeatable; @FILE has one per line; default: $LAGUNA_API_KEY, else $VLLM_API_KEY."
            " A key on the command line is seen by this machine's users, one in a file or the environment is not",
            metavar="KEY|@FILE",
            repeated=True,
        ),
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...],
        Flag(
            "a web page's origin (https://host) from which browsers may ask, * for all; repeatable",
            metavar="ORIGIN",
            repeated=True,
        ),
    ] = ()
    restart: Annotated[
        bool,
        Flag(
            "start an engine that died again, behind the gateway, whose requests wait meanwhile (default: on)",
            either_way=True,
        ),
    ] = True
    dry_run: Annotated[
        bool,
        Flag(
            "say what would be started, as `laguna doctor MODEL` does, and start nothing; exit status 2 if it cannot be"
        ),
    ] = False
    seed: Annotated[int, Flag("sampling seed (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    log: Annotated[
        Path | None, Flag("engine's log (default: ~/.cache/laguna-serve/serve-PORT.log)", metavar="FILE")
    ] = None


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """What a configuration comes to: the engine, and the gateway in front of it, if there is one.

    Attributes:
        api_key: what the engine itself asks of requests.
        host, port: where clients ask; port None: a free one.
        locked: clients must give a key.
    """

    engine: EngineConfig
    gateway: FrontSettings | None
    api_key: str | None
    host: str
    port: int | None
    locked: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the last line on stdout is a JSON object."""
    return run(read_model_flags(ServeConfig, argv, prog="laguna serve", description=DESCRIPTION, epilog=EPILOG))


def run(config: ServeConfig) -> int:
    """Serve, or say what would be started. Returns the exit status.

    Raises:
        CommandError: it cannot be started as configured.
    """
    if config.more_models or config.memory_budget is not None or config.idle_timeout is not None:
        return run_several(config)
    if not config.dry_run:  # γ is found by the drafter's
        describe_models(config.model, config.draft)
    service = plan_service(config)
    if service.host not in LOOPBACK and not service.locked:
        print(f"warning: {service.host}: everybody who can reach it may ask; give --api-key", file=sys.stderr)
    if config.dry_run and (diffusion := find_diffusion(config.model)) is not None:
        planned = plan_diffusion(service.engine, diffusion, require_device())
        print_result(format_diffusion(planned), to_json(planned), None, always_json=False)
        return HELD if planned.ok else COULD_NOT_RUN
    if config.dry_run:
        plan = rehearse(service.engine, service.api_key)
        print_result(format_plan(plan), to_json(describe_plan(plan)), None, always_json=False)
        return COULD_NOT_RUN if plan.refusals else HELD
    if service.engine.adaptive:
        print(f"--gamma adaptive: {describe_adaptive(require_device())}", file=sys.stderr)
    result = serve(
        service.engine,
        service.gateway,
        service.api_key,
        config.log or find_serve_log(service.port or 0),
        restart=config.restart,
        greet=format_greeting,
    )
    print_line(to_json(result))
    return FELL_SHORT if result.outcome == DIED else HELD


def plan_service(config: ServeConfig) -> ServicePlan:
    """Plan the engine and the gateway of a configuration; what both refuse without an engine is refused here.

    Raises:
        CheckpointError, EngineError: something does not go together, or cannot be had.
    """
    keys = read_keys(config.api_key, os.environ)
    if not config.gateway:
        engine, key = bare_engine_config(config, keys), next(iter(keys), None)
        return ServicePlan(engine, None, key, engine.host, engine.port, key is not None)
    engine = engine_config(config)
    settings = FrontSettings(
        model=engine.model_name,
        max_num_seqs=engine.max_num_seqs,
        file=config.gateway_config,
        host=config.host,
        port=config.port,
        keys=keys,
        origins=config.allow_origin,
        temperature=find_temperature(engine.model, engine.extra_args),
    )
    host, port, locked = check_front(settings)
    return ServicePlan(replace(engine, host=LOOPBACK[0], port=None), settings, None, host, port, locked)


def engine_config(config: ServeConfig) -> EngineConfig:
    """Return the engine by itself. Raises CheckpointError when --gamma auto finds nothing."""
    return replace(
        make_engine_config(config.model, config),
        host=config.host or DEFAULT_HOST,
        port=DEFAULT_PORT if config.port is None else config.port or None,
        served_model_name=config.served_model_name,
        seed=config.seed,
        exact=config.exact,
        weight_updates=config.weight_updates,
        return_routed_experts=config.return_routed_experts,
    )


def bare_engine_config(config: ServeConfig, keys: Sequence[str]) -> EngineConfig:
    """Return the engine without the gateway: at a port that stays the same when it is started again.

    Raises:
        CheckpointError: what only the gateway does was asked for.
    """
    engine = engine_config(config)
    if config.gateway_config is not None:
        raise CheckpointError("--gateway-config: expected the gateway, got --no-gateway beside it; drop one")
    if len(keys) > 1:
        remedy = "keep one, or leave --no-gateway out"
        raise CheckpointError(
            f"--api-key: expected one key with --no-gateway, as vLLM takes, got {len(keys)}; {remedy}"
        )
    origins = ("--allowed-origins", json.dumps(config.allow_origin)) if config.allow_origin else ()
    port = find_port(engine.host) if engine.port is None else require_port(engine.host, engine.port)
    return replace(engine, port=port, extra_args=(*engine.extra_args, *origins))


def rehearse(config: EngineConfig, api_key: str | None) -> EnginePlan:
    """Everything that is checked before a start, and the plan; nothing is started."""
    plan = make_plan(config, require_device())
    try:
        command = tuple(plan_launch(config, api_key).command)
        return refuse_unknown_flags(plan if plan.refusals else replace(plan, command=command))
    except EngineError as error:  # the plan may have said so already
        return replace(plan, command=(), refusals=tuple(dict.fromkeys((*plan.refusals, str(error)))))


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
