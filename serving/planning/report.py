"""A plan for people: a line for each thing that is known of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from laguna_serve.serving.chat.vendor_defaults import describe_chat
from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.checkpoint.parameters import count_active, count_drafter, count_parameters
from laguna_serve.serving.checkpoint.quantisation import Quantisation
from laguna_serve.serving.checkpoint.target import Target, count_dense_layers
from laguna_serve.serving.machine.memory import GIB, show_size
from laguna_serve.serving.planning.plan import EnginePlan
from laguna_serve.serving.planning.support import SupportVerdict, describe_kind
from laguna_serve.serving.speculation.adaptive import describe_adaptive

WIDTH = 13


def format_command(plan: EnginePlan) -> str:
    """Format the command with its environment, for a POSIX shell."""
    variables = [part for name in plan.unset for part in ("-u", name)]
    variables += [f"{name}={value}" for name, value in sorted(plan.environment.items())]
    return shlex.join(["env", *variables, *plan.command])


def format_plan(plan: EnginePlan) -> str:
    """Format a line for each thing that is known, the command last."""
    rows = list(_list_rows(plan))
    lines = [f"{name:<{WIDTH}} {text}" for name, text in rows]
    lines += [f"{'warning':<{WIDTH}} {warning}" for warning in plan.warnings]
    lines += [f"{'refused':<{WIDTH}} {refusal}" for refusal in plan.refusals]
    if plan.command:
        lines.append(f"{'command':<{WIDTH}} {format_command(plan)}")
    return "\n".join(lines)


def _list_rows(plan: EnginePlan) -> Iterator[tuple[str, str]]:
    device, target, drafter = plan.device, plan.checkpoints.target, plan.checkpoints.drafter
    label = "a plan for a device that was named; nothing of this machine" if plan.planned else "this machine"
    capability = "" if device.capability is None else f", compute capability {device.capability / 10}"
    yield "device", f"{device.name}{capability}, {show_size(device.total_bytes)} ({label})"
    if target is None and plan.checkpoints.unplanned:
        yield "model", f"{plan.config.model}: {plan.checkpoints.unplanned}; vLLM finds out what it takes when it starts"
    elif target is None:
        yield "model", f"{plan.config.model}: not on this machine; vLLM downloads it, and nothing of it is known here"
    else:
        yield from _list_target(plan, target)
    if drafter is not None:
        yield from _list_drafter(plan, drafter)
    for name, path in plan.classes.items():
        yield "class", f"{name}: {path}"
    yield from _list_memory(plan)
    for line in describe_chat(plan.checkpoints.chat):
        yield "chat", line
    yield "runner", describe_runner(plan)


def _list_target(plan: EnginePlan, target: Target) -> Iterator[tuple[str, str]]:
    yield "model", target.name
    dense = count_dense_layers(target)
    if target.dense:
        mlp = "all dense"
    else:
        mlp = f"{dense} dense, {target.num_layers - dense} sparse of {target.num_experts} experts, "
        mlp += f"{target.experts_per_token} per token"
    window = f", {target.sliding_layers} of them over {target.sliding_window} tokens" if target.sliding_layers else ""
    yield "layers", f"{target.num_layers}{window}; {mlp}"
    total, active = count_stored(plan, target)
    yield "parameters", f"{total:,}" + ("" if active is None else f", {active:,} of them per token")
    yield "weights", _describe_weights(target.quantisation, plan.target_verdict)


def _list_drafter(plan: EnginePlan, drafter: Drafter) -> Iterator[tuple[str, str]]:
    kind = "sliding" if "sliding_attention" in drafter.attention.layer_types else "full"
    mixed = "mixed" if drafter.mixed else kind
    text = f"{drafter.format} format, {drafter.num_layers} layers ({mixed} attention)"
    text += f", {count_drafter(drafter):,} parameters"
    yield "drafter", f"{text}: it fits the model" if plan.checkpoints.target is not None else text
    yield "draft weights", _describe_weights(drafter.quantisation, plan.drafter_verdict)
    vendor = " or ".join(map(str, plan.vendor_gamma))
    recommended = f"; Poolside recommends {vendor}" if vendor else ""
    if plan.config.adaptive:
        yield "gamma", f"adaptive, up to {plan.checkpoints.gamma}: {describe_adaptive(plan.device)}"
        return
    yield "gamma", f"{plan.checkpoints.gamma} of at most {drafter.max_gamma} (block {drafter.block_size}){recommended}"


def _describe_weights(quantisation: Quantisation | None, verdict: SupportVerdict | None) -> str:
    name = "unquantised" if quantisation is None else describe_kind(quantisation)
    if verdict is None:
        return name
    return f"{name}: {verdict.how}, {verdict.reason}" + (f"; {verdict.remedy}" if verdict.remedy else "")


def _list_memory(plan: EnginePlan) -> Iterator[tuple[str, str]]:
    memory, layout = plan.memory, plan.layout
    if memory is None or layout is None or plan.length is None or plan.context is None:
        if plan.checkpoints.weight_bytes:
            yield "memory", f"weights {show_size(plan.checkpoints.weight_bytes)} on disk"
        return
    source = "" if plan.weights_here else " by config.json"
    parts = [f"weights {show_size(memory.weights)}{source}"]
    if plan.device.kind == "gpu":
        parts.append(f"activations about {memory.activations / GIB:.1f}")
        parts.append(f"CUDA graphs about {memory.graphs / GIB:.1f}, context {memory.context / GIB:.1f}")
    divided = plan.device.kind == "gpu" or bool(plan.command)  # a CPU's is while the command is built
    left = f"; left for the KV cache {show_size(memory.kv)}" if divided else ""
    yield "memory", f"{', '.join(parts)}{left}"
    sequence = show_size(layout.sequence_bytes(plan.length))
    yield (
        "KV cache",
        f"{layout.token_bytes:,} bytes per token of a long sequence; {sequence} for {plan.length:,} tokens",
    )
    if plan.kv_dtype is not None:
        yield "KV dtype", f"{plan.kv_dtype[0]}: {plan.kv_dtype[1]}"
    if not divided:
        return
    one, many = plan.context
    full = "the whole" if one == plan.length else f"{plan.length:,} do not fit"
    yield "context", f"{one:,} tokens for one sequence ({full}), {many:,} for {plan.config.max_num_seqs} at once"


def count_stored(plan: EnginePlan, target: Target) -> tuple[int, int | None]:
    """Parameters, and those of a token, which for pruned experts depend on the token.

    It is what the files hold, as experts and layers may be stored narrower than config.json says.
    """
    total = count_parameters(target) if plan.stored is None else plan.stored
    return total, None if target.pruned else count_active(target) - (count_parameters(target) - total)


def describe_runner(plan: EnginePlan) -> str:
    """Which of vLLM's two model runners computes."""
    chosen = plan.environment.get("VLLM_USE_V2_MODEL_RUNNER")
    if chosen is not None:
        return f"vLLM's V{2 if chosen == '1' else 1} model runner (VLLM_USE_V2_MODEL_RUNNER={chosen})"
    return "vLLM's V2 model runner where Triton is installed, as with vLLM's own wheels, else V1"
