"""What serving a masked diffusion model on a device would take, as a result and for people."""

from __future__ import annotations

import shlex

import msgspec
from msgspec import structs

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import ARCHITECTURE, DiffusionModel
from laguna_serve.serving.checkpoint.target import value_bytes
from laguna_serve.serving.kit.environment import describe_device
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import show_size
from laguna_serve.serving.planning.diffusion.command import (
    SERVER_MODULE,
    build_diffusion_command,
    find_draft,
    require_files,
)
from laguna_serve.serving.planning.engine_config import DEFAULT_PORT, EngineConfig
from laguna_serve.serving.planning.result import PlannedDevice

WIDTH = 13


class PlannedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model's shape; `weights`: bytes of them as they will lie in the device's memory."""

    layers: int
    parameters: int
    weights: int
    max_model_len: int


class DiffusionPlanResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.diffusion_plan/1"
):
    """What serving it would take.

    Attributes:
        cache: bytes of keys and values that a block cache may hold, for all requests at full length.
    """

    ok: bool
    refusals: tuple[str, ...]
    device: PlannedDevice
    model: str
    draft: str | None
    architecture: str
    target: PlannedModel
    drafter: PlannedModel | None
    dtype: str
    cache: int
    max_num_seqs: int
    command: tuple[str, ...]


def plan_diffusion(
    config: EngineConfig, model: DiffusionModel, device: Device, *, planned: bool = False, files: bool = True
) -> DiffusionPlanResult:
    """Plan it; nothing is started.

    Args:
        config: what is asked for.
        model: that it names.
        device: to plan for.
        planned: the device is not this machine's.
        files: weights and tokenizer are needed, too.

    Raises:
        CheckpointError: the draft cannot be read, or does not fit.
    """
    draft = None if config.draft is None else find_draft(config.draft, model)
    dtype = choose_dtype(config.dtype, model, device)
    size = value_bytes(dtype)
    weights = size * (model.parameters + (0 if draft is None else draft.parameters))
    refusals: list[str] = []
    command: tuple[str, ...] = ()
    try:
        command = tuple(build_diffusion_command(config, model, config.port or DEFAULT_PORT))
        if files:
            require_files(config, model)
    except CheckpointError as error:
        refusals.append(str(error))
    if weights > device.total_bytes:
        room = f"{show_size(device.total_bytes)} of {device.name}"
        refusals.append(f"memory: expected weights within the {room}, got {show_size(weights)}; take another device")
    length = config.max_model_len or model.max_model_len
    values = model.kv_values_per_token + (0 if draft is None else draft.kv_values_per_token)
    return DiffusionPlanResult(
        ok=not refusals,
        refusals=tuple(refusals),
        device=PlannedDevice(**structs.asdict(describe_device(device)), planned=planned),
        model=config.model,
        draft=config.draft,
        architecture=ARCHITECTURE,
        target=_describe(model, size),
        drafter=None if draft is None else _describe(draft, size),
        dtype=dtype,
        cache=size * values * length * config.max_num_seqs,
        max_num_seqs=config.max_num_seqs,
        command=() if refusals else command,
    )


def choose_dtype(asked: str, model: DiffusionModel, device: Device) -> str:
    """Choose the dtype as the engine does: float32 on a CPU and the checkpoint's on a GPU, where none is asked for."""
    chosen = asked if asked != "auto" else "float32" if device.kind == "cpu" else model.dtype
    return {"float": "float32", "half": "float16"}.get(chosen, chosen)


def format_diffusion(plan: DiffusionPlanResult) -> str:
    """Format a line for each thing that is known, the command last."""
    rows = [
        ("device", f"{plan.device.name}, {show_size(plan.device.total_bytes)}"),
        ("model", f"{plan.model}: masked diffusion, {_format(plan.target)}"),
        *([] if plan.drafter is None else [("draft", f"{plan.draft}: {_format(plan.drafter)}")]),
        ("class", f"{plan.architecture}: {SERVER_MODULE}, not vLLM"),
        ("context", f"{plan.target.max_model_len:,} tokens of prompt and canvas"),
        ("memory", f"weights in {plan.dtype}; a block cache (-- --cache dual) up to {show_size(plan.cache)} more"),
        *(("refused", refusal) for refusal in plan.refusals),
        *([("command", shlex.join(plan.command))] if plan.command else []),
    ]
    return "\n".join(f"{name:<{WIDTH}} {text}" for name, text in rows)


def _describe(model: DiffusionModel, size: int) -> PlannedModel:
    return PlannedModel(
        layers=model.layers,
        parameters=model.parameters,
        weights=size * model.parameters,
        max_model_len=model.max_model_len,
    )


def _format(model: PlannedModel) -> str:
    return f"{model.layers} layers, {model.parameters:,} parameters, {show_size(model.weights)}"
