"""`laguna serve MODEL MODEL…`: the gateway owns the engines, and loads each when it is asked for."""

from __future__ import annotations

import os
import sys

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.commands.gateway import GatewayResult, check_engines
from laguna_serve.serving.commands.model_options import ModelOptions
from laguna_serve.serving.engine.hub import describe_models
from laguna_serve.serving.kit.cli import HELD, print_line
from laguna_serve.serving.kit.results import JsonObject, to_json
from laguna_serve.serving.machine.local_http import LOOPBACK
from laguna_serve.serving.service.api_keys import read_keys
from laguna_serve.serving.service.several import SeveralSettings, make_several_config

# What is one model's: with several it would have to be said for each, which a file does.
OF_ONE = ("draft", "keep_mask", "group_indices", "served_model_name", "log")
INSTEAD = "give each model its [models.engine] in a file for laguna gateway --config"


def run_several(config: ModelOptions) -> int:
    """Serve what `laguna serve` was asked for until a signal. Returns the exit status.

    Raises:
        CheckpointError, EngineError: it cannot be served.
    """
    from laguna_serve.serving.gateway.run import serve

    settings = plan_several(config)
    for name in settings.models:
        describe_models(name, None)
    gateway = make_several_config(settings)
    check_engines(gateway)
    if gateway.server.host not in LOOPBACK and not gateway.keys:
        print(f"warning: {gateway.server.host}: everybody who can reach it may ask; give --api-key", file=sys.stderr)
    names = ", ".join(model.name for model in gateway.models)
    url = serve(
        gateway,
        lambda url, admin: print(
            f"serving {names} at {url}/v1, each when it is asked for  (Ctrl-C stops it)\nstatus: {admin}", flush=True
        ),
        None,
    )
    print_line(to_json(GatewayResult(outcome="stopped", url=url)))
    return HELD


def plan_several(config: ModelOptions) -> SeveralSettings:
    """Plan what is served. Raises CheckpointError: a flag does not go together with several models."""
    given = vars(config)
    models = (given["model"], *given["more_models"])
    for name in OF_ONE:
        if len(models) > 1 and given[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(f"{flag}: expected one model beside it, got {len(models)}; {INSTEAD}")
    if not given["gateway"] or given["gateway_config"] is not None or given["dry_run"] or not given["restart"]:
        flags = "--no-gateway, --gateway-config, --dry-run and --no-restart"
        raise CheckpointError(f"{flags}: expected none of them beside several models or a budget, got one; drop it")
    for name in ("memory_budget", "idle_timeout"):
        if given[name] is not None and not given[name] > 0:
            raise CheckpointError(f"--{name.replace('_', '-')}: expected more than 0, got {given[name]}; raise it")
    if len(set(models)) < len(models):
        raise CheckpointError("models: expected each once, got one twice; drop it")
    return SeveralSettings(
        models=models,
        engine=list_engine_options(given),
        names={} if given["served_model_name"] is None else {given["model"]: given["served_model_name"]},
        memory_gib=given["memory_budget"],
        idle_timeout_s=given["idle_timeout"],
        host=given["host"],
        port=given["port"],
        keys=read_keys(given["api_key"], os.environ),
        origins=given["allow_origin"],
    )


def list_engine_options(given: JsonObject) -> JsonObject:
    """List the flags that an engine's table has too, under the same names; what was not given is left out."""
    from laguna_serve.serving.gateway.config.owned import OwnedEngine

    options = {name: given[name] for name in OwnedEngine.model_fields.keys() & given.keys() if given[name] is not None}
    options |= {} if given["log"] is None else {"log": str(given["log"])}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
