"""Everything that can be said of an engine before it is started: what it loads, what that takes, what will run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from laguna_serve.serving.checkpoint import CheckpointError, Target, find_folder
from laguna_serve.serving.checkpoint.drafter import ARCHITECTURE, LAGUNA, ORIGINAL_ARCHITECTURE, Drafter
from laguna_serve.serving.checkpoint.others import SERVED_BY
from laguna_serve.serving.checkpoint.stored.weight_files import count_values, measure_weights
from laguna_serve.serving.checkpoint.target import find_served_dtype, value_bytes
from laguna_serve.serving.kit.flags.vllm import find_value, find_whole
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import show_size
from laguna_serve.serving.planning.budget import MAX_GPU_SHARE, BudgetError
from laguna_serve.serving.planning.command import (
    KV_DTYPE,
    build_command,
    build_environment,
    choose_max_model_len,
    choose_overrides,
    choose_settings,
    count_ranks,
    list_device_warnings,
    settle_dtype,
    wanted_weight_bytes,
)
from laguna_serve.serving.planning.engine_config import DEFAULT_PORT, EngineConfig
from laguna_serve.serving.planning.inspection import Checkpoints, inspect
from laguna_serve.serving.planning.kv import KvLayout, Memory, choose_batched_tokens, plan_layout, share_gpu
from laguna_serve.serving.planning.support import (
    SupportVerdict,
    choose_kv_dtype,
    judge_drafter,
    judge_target,
    kv_value_bytes,
)

VLLM = "vLLM's own"
# The vendor's γ, from the models' cards and github.com/vllm-project/recipes (models/poolside), by the target's name.
VENDOR_GAMMA = {"xs.2": (7,), "xs-2.1": (15,), "s-2.1": (7, 15)}


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine that could be started, or not.

    Attributes:
        planned: the device is one that was named, not this machine's.
        refusals: why it cannot be started, a line each.
        length: the longest sequence that is asked for; None where nothing is known.
        context: longest context of one sequence, and of `max_num_seqs` at once; None where nothing is known.
        environment, unset: what the engine's environment has otherwise than this process's.
        weights_here: the weights are on this machine, and their size is theirs and not config.json's.
        stored: how many parameters the model's files hold; None without them, or where they are quantised.
    """

    config: EngineConfig
    device: Device
    planned: bool
    checkpoints: Checkpoints
    target_verdict: SupportVerdict | None
    drafter_verdict: SupportVerdict | None
    classes: Mapping[str, str]
    layout: KvLayout | None
    memory: Memory | None
    length: int | None
    context: tuple[int, int] | None
    kv_dtype: tuple[str, str] | None
    weights_here: bool
    stored: int | None
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def vendor_gamma(self) -> tuple[int, ...]:
        """What Poolside recommends for this model's drafter; empty where it says nothing."""
        names = [Path(name).name.lower() for name in (self.config.draft or "", self.config.model)]
        recommended = (gamma for name in names for key, gamma in VENDOR_GAMMA.items() if f"laguna-{key}" in name)
        return next(recommended, ()) if self.config.draft is not None else ()


def make_plan(config: EngineConfig, device: Device, *, planned: bool = False) -> EnginePlan:
    """Make the plan of a configuration on a device.

    Raises:
        CheckpointError: target or drafter cannot be read, or do not fit each other.
    """
    checkpoints = inspect(config, weights=False)
    config, notes = settle_dtype(config, checkpoints, device)
    target, drafter = checkpoints.target, checkpoints.drafter
    refusals: list[str] = []
    command: tuple[str, ...] = ()
    try:
        command = tuple(build_command(config, checkpoints, device, config.port or DEFAULT_PORT))
    except (BudgetError, CheckpointError) as error:
        refusals.append(str(error))
    layout = memory = length = context = None
    if target is not None:
        layout = _lay_out(config, checkpoints, device)
        memory = _share_memory(config, checkpoints, device, command)
        length = _find_length(config, checkpoints, device, target)
        longest = [layout.longest(memory.kv, count, length) for count in (1, config.max_num_seqs)]
        context = longest[0], longest[1]
        if command and not context[0]:
            refusals.append(_describe_no_room(device, memory))
        elif command and device.kind == "gpu" and config.max_model_len is not None and context[0] < length:
            fits = f"{device.name} has room for {context[0]}"
            refusals.append(f"--max-model-len: expected a length that fits, got {length}, and {fits}; lower it")
    base = {} if planned else dict(os.environ)
    environment = build_environment(
        base,
        device,
        local=checkpoints.local,
        weight_bytes=checkpoints.target_bytes,
        exact=config.exact,
        weight_updates=config.weight_updates,
        settings=choose_settings(config, checkpoints, device),
    )
    return EnginePlan(
        config=config,
        device=device,
        planned=planned,
        checkpoints=checkpoints,
        target_verdict=None if target is None else judge_target(target, device),
        drafter_verdict=None if drafter is None else judge_drafter(drafter, device),
        classes=find_classes(config, checkpoints, device),
        layout=layout,
        memory=memory,
        length=length,
        context=context,
        kv_dtype=None if target is None else choose_kv_dtype(target, device),
        weights_here=_has_weights(config),
        stored=_count_stored(config, target),
        command=() if refusals else command,
        environment={name: value for name, value in environment.items() if base.get(name) != value},
        unset=tuple(sorted(base.keys() - environment.keys())),
        refusals=tuple(refusals),
        warnings=(*notes, *checkpoints.warnings, *list_device_warnings(config, checkpoints, device)),
    )


def find_classes(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> dict[str, str]:
    """Architecture → the class that serves it, for target and drafter."""
    # Here, as the doctor's check of the installation must run where the plugin is broken.
    from laguna_serve.plugins.register import ARCHITECTURES, CPU_ARCHITECTURES

    known = ARCHITECTURES | CPU_ARCHITECTURES if device.kind == "cpu" else ARCHITECTURES
    names = []
    if checkpoints.target is not None:
        overrides = choose_overrides(config, checkpoints.target, device) or {}
        chosen = overrides.get("architectures")
        names.append(str(chosen[0]) if isinstance(chosen, list) else checkpoints.target.architecture)
    elif checkpoints.other is not None:
        names.append(checkpoints.other)
    if checkpoints.drafter is not None:
        names.append(ARCHITECTURE if checkpoints.drafter.format == LAGUNA else ORIGINAL_ARCHITECTURE)
    return {name: known.get(name, SERVED_BY if name == checkpoints.other else VLLM) for name in names}


def _lay_out(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> KvLayout:
    target = checkpoints.target
    assert target is not None
    return plan_layout(
        target,
        checkpoints.drafter,
        device,
        value_bytes=kv_value_bytes(target, device, config.dtype, find_value(config.extra_args, KV_DTYPE)),
        batched_tokens=_count_batched(config, device),
        ranks=count_ranks(config.extra_args),
    )


def _count_batched(config: EngineConfig, device: Device) -> int:
    return find_whole(config.extra_args, "--max-num-batched-tokens") or choose_batched_tokens(device)


def _share_memory(config: EngineConfig, checkpoints: Checkpoints, device: Device, command: tuple[str, ...]) -> Memory:
    target = checkpoints.target
    assert target is not None
    weights = wanted_weight_bytes(config, checkpoints, device)
    given = find_whole(command, "--kv-cache-memory-bytes")
    if device.kind == "cpu":
        return Memory(weights, 0, 0, 0, given or 0)
    return share_gpu(
        target,
        device,
        weights,
        batched_tokens=_count_batched(config, device),
        sequences=config.max_num_seqs,
        rows=1 + (checkpoints.gamma or 0),
        graphed_layers=0 if config.enforce_eager else target.num_layers + _count_layers(checkpoints.drafter),
        share=_read_share(find_value(command, "--gpu-memory-utilization")),
        given=given,
        value_bytes=value_bytes(find_served_dtype(target.dtype, config.dtype)),
    )


def _read_share(given: str | None) -> float:
    """Read the share of a GPU's memory; of one that is none vLLM says what is wrong."""
    try:
        share = float(given or MAX_GPU_SHARE)
    except ValueError:
        return MAX_GPU_SHARE
    return share if 0 < share <= 1 else MAX_GPU_SHARE


def _find_length(config: EngineConfig, checkpoints: Checkpoints, device: Device, target: Target) -> int:
    """Find the longest sequence on vLLM's command line; the model's own where none is there, or vLLM works it out."""
    length = choose_max_model_len(config, checkpoints, device)
    return length if isinstance(length, int) else target.max_model_len


def _count_stored(config: EngineConfig, target: Target | None) -> int | None:
    folder = find_folder(config.model)
    if target is None or target.quantisation is not None or folder is None or not measure_weights(folder):
        return None
    return count_values(folder) or None


def _count_layers(drafter: Drafter | None) -> int:
    return 0 if drafter is None else drafter.num_layers


def _describe_no_room(device: Device, memory: Memory) -> str:
    used = show_size(memory.weights + memory.activations + memory.graphs + memory.context)
    got = f"weights and buffers of about {used} of {show_size(device.total_bytes)}"
    remedy = "take a larger GPU, a quantised release, or several with -- --tensor-parallel-size N"
    return f"memory of {device.name}: expected room for a KV cache, got {got}; {remedy}"


def _has_weights(config: EngineConfig) -> bool:
    folders = [find_folder(name) for name in (config.model, config.draft) if name is not None]
    return all(folder is not None and measure_weights(folder) > 0 for folder in folders)
