"""A plan as JSON; bytes and tokens are integers."""

from __future__ import annotations

from dataclasses import asdict

import msgspec
from msgspec import structs

from laguna_serve.serving.chat.vendor_defaults import VllmSetting
from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.checkpoint.parameters import count_drafter
from laguna_serve.serving.checkpoint.target import Target, count_dense_layers
from laguna_serve.serving.kit.environment import EnvironmentDevice, describe_device
from laguna_serve.serving.planning.plan import EnginePlan
from laguna_serve.serving.planning.report import count_stored, describe_runner
from laguna_serve.serving.planning.support import SupportVerdict


class PlannedDevice(EnvironmentDevice, frozen=True, kw_only=True):
    """`planned`: it was named, and is not this machine's."""

    planned: bool


class PlannedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """The model, and what the device makes of its weights."""

    architecture: str
    layers: int
    dense_layers: int
    sliding_layers: int
    experts: int
    max_model_len: int
    parameters: int
    active_parameters: int | None
    quantisation: str | None
    verdict: SupportVerdict | None


class PlannedDrafter(msgspec.Struct, frozen=True, kw_only=True):
    """The drafter, and what the device makes of its weights; `adaptive`: γ is decided in every step, up to `gamma`."""

    format: str
    layers: int
    parameters: int
    block_size: int
    gamma: int | None
    adaptive: bool = False
    vendor_gamma: tuple[int, ...]
    quantisation: str | None
    verdict: SupportVerdict | None


class PlannedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the device's memory goes to, in bytes; `weights_here`: by the files, not by config.json."""

    weights: int
    activations: int
    graphs: int
    context: int
    kv: int
    weights_here: bool


class PlannedCache(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache: bytes per token of a long sequence, and of the longest sequence; dtype None: the model's."""

    bytes_per_token: int
    bytes_per_sequence: int
    dtype: str | None


class PlannedContext(msgspec.Struct, frozen=True, kw_only=True):
    """The longest sequence, in tokens: of one alone, and of `max_num_seqs` at once."""

    one: int
    all: int


class PlanResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.plan/1"):
    """What serving a model on a device would take. None where nothing is known of it here."""

    ok: bool
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    device: PlannedDevice
    model: str
    draft: str | None
    classes: dict[str, str]
    target: PlannedTarget | None
    drafter: PlannedDrafter | None
    memory: PlannedMemory | None
    kv_cache: PlannedCache | None
    context: PlannedContext | None
    max_num_seqs: int
    chat: tuple[VllmSetting, ...]
    runner: str
    environment: dict[str, str]
    command: tuple[str, ...]


def describe_plan(plan: EnginePlan) -> PlanResult:
    """Describe the plan as its result."""
    target, drafter = plan.checkpoints.target, plan.checkpoints.drafter
    context, memory = plan.context, plan.memory
    return PlanResult(
        ok=not plan.refusals,
        refusals=plan.refusals,
        warnings=plan.warnings,
        device=PlannedDevice(**structs.asdict(describe_device(plan.device)), planned=plan.planned),
        model=plan.config.model,
        draft=plan.config.draft,
        classes=dict(plan.classes),
        target=None if target is None else _describe_target(plan, target),
        drafter=None if drafter is None else _describe_drafter(plan, drafter),
        memory=None if memory is None else PlannedMemory(**asdict(memory), weights_here=plan.weights_here),
        kv_cache=_describe_cache(plan),
        context=None if context is None else PlannedContext(one=context[0], all=context[1]),
        max_num_seqs=plan.config.max_num_seqs,
        chat=plan.checkpoints.chat.flags,
        runner=describe_runner(plan),
        environment=dict(plan.environment),
        command=plan.command,
    )


def _describe_target(plan: EnginePlan, target: Target) -> PlannedTarget:
    parameters, active = count_stored(plan, target)
    return PlannedTarget(
        architecture=target.architecture,
        layers=target.num_layers,
        dense_layers=count_dense_layers(target),
        sliding_layers=target.sliding_layers,
        experts=target.num_experts,
        max_model_len=target.max_model_len,
        parameters=parameters,
        active_parameters=active,
        quantisation=None if target.quantisation is None else target.quantisation.kind,
        verdict=plan.target_verdict,
    )


def _describe_drafter(plan: EnginePlan, drafter: Drafter) -> PlannedDrafter:
    return PlannedDrafter(
        format=drafter.format,
        layers=drafter.num_layers,
        parameters=count_drafter(drafter),
        block_size=drafter.block_size,
        gamma=plan.checkpoints.gamma,
        adaptive=plan.config.adaptive,
        vendor_gamma=plan.vendor_gamma,
        quantisation=None if drafter.quantisation is None else drafter.quantisation.kind,
        verdict=plan.drafter_verdict,
    )


def _describe_cache(plan: EnginePlan) -> PlannedCache | None:
    if plan.layout is None or plan.length is None:
        return None
    return PlannedCache(
        bytes_per_token=plan.layout.token_bytes,
        bytes_per_sequence=plan.layout.sequence_bytes(plan.length),
        dtype=None if plan.kv_dtype is None else plan.kv_dtype[0],
    )
