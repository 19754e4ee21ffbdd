"""From a model's table to the engine that is started, and to the memory that it is taken to need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import find_diffusion
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.gateway.config.owned import OwnedEngine, name_engine
from laguna_serve.serving.machine.cache import find_own_cache
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.budget import ENGINE_BYTES, GPU_CONTEXT_BYTES
from laguna_serve.serving.planning.diffusion.command import build_diffusion_command, require_files
from laguna_serve.serving.planning.diffusion.plan import plan_diffusion
from laguna_serve.serving.planning.launch import check_launch, require_device
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.vllm_flags import VLLM, check_flags
from laguna_serve.serving.speculation.gamma_store import settle_gamma

# Torch and the server of a masked diffusion engine, in one process: 0.4 GB measured on a CPU.
DIFFUSION_BYTES = 10**9
SLEEP_FLAG = "--enable-sleep-mode"


def make_engine_config(name: str, table: OwnedEngine) -> EngineConfig:
    """Make the engine of a table, on the loopback address and a free port.

    Raises:
        CheckpointError: γ "auto" without a sweep of this pair.
    """
    drafting = settle_gamma(table.model, table.draft, table.gamma, table.draft_sampling)
    sleeps = table.sleep_level > 0
    return EngineConfig(
        model=table.model,
        keep_mask=table.keep_mask,
        group_indices=table.group_indices,
        draft=drafting.draft,
        gamma=drafting.gamma,
        adaptive=drafting.adaptive,
        gamma_schedule=drafting.schedule,
        draft_sampling=drafting.sampling,
        served_model_name=name,
        dtype=table.dtype,
        max_model_len=table.max_model_len,
        max_num_seqs=table.max_num_seqs,
        enforce_eager=table.eager,
        prefix_caching=table.prefix_caching,
        kv_cache_gib=table.kv_cache_gib,
        seed=table.seed,
        exact=table.exact,
        weight_updates=table.weight_updates or sleeps,  # sleep and restored weights are development routes
        return_routed_experts=table.return_routed_experts,
        chat=ChatOptions(table.tool_call_parser, table.reasoning_parser, table.thinking),
        extra_args=(*table.extra_args, *((SLEEP_FLAG,) if sleeps else ())),
    )


def check_engine(config: EngineConfig) -> None:
    """Check an engine that is started later: all but flags that are vLLM's, memory and port.

    Raises:
        CheckpointError: it cannot be served.
    """
    if (diffusion := find_diffusion(config.model)) is None:
        check_launch(config)
        return
    require_files(config, diffusion)
    build_diffusion_command(config, diffusion, port=0)


def check_foreign_flags(configs: Iterable[EngineConfig]) -> None:
    """Ask vLLM about flags that are handed to it unread. Raises CheckpointError: it does not know one."""
    foreign = [config for config in configs if config.extra_args and find_diffusion(config.model) is None]
    check_flags([[*VLLM, config.model, *config.extra_args] for config in foreign])


def plan_bytes(name: str, table: OwnedEngine, find: Callable[[], Device] = require_device) -> int:
    """Plan what the engine will take, before it was ever measured; 0 where nothing can be said of it.

    What cannot be started says so when it is.
    """
    if table.memory_gib is not None:
        return int(table.memory_gib * GIB)
    try:
        device = find()
        config = make_engine_config(name, table)
        if (diffusion := find_diffusion(table.model)) is not None:
            canvas = plan_diffusion(config, diffusion, device, files=False)
            weights = canvas.target.weights + (canvas.drafter.weights if canvas.drafter is not None else 0)
            return weights + (DIFFUSION_BYTES if device.kind == "cpu" else GPU_CONTEXT_BYTES)
        plan = make_plan(config, device)
    except (CheckpointError, EngineError):
        return 0
    memory, engine = plan.memory, ENGINE_BYTES if device.kind == "cpu" else 0
    if memory is None:
        stored = plan.checkpoints.weight_bytes
        return stored + engine if stored else 0
    planned = memory.weights + memory.activations + memory.graphs + memory.context + memory.kv
    return planned + engine


def find_log(name: str, table: OwnedEngine, port: int) -> Path:
    """Find where the engine's log goes; by default into the user's cache, by the gateway's port and the name."""
    if table.log is not None:
        return Path(table.log)
    return find_own_cache() / f"gateway-{port}-{name_engine(name).replace('/', '-')}.log"
