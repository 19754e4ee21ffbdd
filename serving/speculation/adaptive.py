"""`--gamma adaptive`: who decides how many tokens are drafted in a step on which device, and where nobody can.

On a GPU vLLM's own adaptive verification cuts each request's drafts to what is worth verifying; it was read in 0.32:
config/vllm.py (`_validate_adaptive_verification`, `_verify_sampling_replay_config`), v1/worker/gpu/spec_decode. On a
CPU, where vLLM has none, the worker of plugins/worker.py decides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.flags.vllm import find_value, names_flag
from laguna_serve.serving.machine.device import Device, VllmInstall, find_vllm

ADAPTIVE_WORKER = "laguna_serve.plugins.worker.AdaptiveCPUWorker"
# Of vLLM's `speculative_config`.
VERIFICATION = {"enable_adaptive_verification": True}
SINCE = (0, 32)
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
PIPELINE = ("--pipeline-parallel-size", "-pp")
DATA_PARALLEL = ("--data-parallel-size", "-dp")
TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")
RANKS = (*TENSOR_PARALLEL, *PIPELINE, *DATA_PARALLEL)
REMEDY = "drop it, or take --gamma N or auto"


def describe_adaptive(device: Device) -> str:
    """Say in a line who decides on a device."""
    if device.kind == "cpu":
        return "the worker decides before every step how many tokens are drafted, down to none, by acceptance and time"
    return "vLLM's adaptive verification decides in every step how many of the drafted tokens are verified"


def check_adaptive(
    device: Device,
    arguments: Sequence[str],
    *,
    eager: bool,
    experts: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse what has no place beside a γ that is decided in every step.

    Args:
        arguments: for vLLM, as the user gave them.
        eager: no compilation, no graphs.
        experts: answers are to carry the experts of every token.
        environment: that vLLM will have.
    Raises:
        CheckpointError: the first such thing, in a line.
    """
    if device.kind == "cpu":
        _check_cpu(arguments, environment)
    elif experts:
        raise CheckpointError(
            f"--gamma adaptive: expected no --return-routed-experts on a GPU, as vLLM does not do both; {REMEDY}"
        )
    else:
        _check_gpu(arguments, eager or names_flag(arguments, "--enforce-eager"), find_vllm(), environment)


def find_several(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """Find the first of these flags that asks for more ranks than one."""
    return next((flag for flag in flags if (find_value(arguments, flag) or "1") != "1"), None)


def _check_cpu(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    if several := find_several(arguments, RANKS):
        expected = "expected one rank, as each would decide by itself"
        raise CheckpointError(f"--gamma adaptive: {expected}, got {several}; {REMEDY}")
    if names_flag(arguments, "--worker-cls", "--speculative-config"):
        raise CheckpointError(
            f"--gamma adaptive: expected our worker and our drafter, got --worker-cls or --speculative-config; {REMEDY}"
        )
    if names_flag(arguments, "--kv-transfer-config"):
        expected = "expected no KV connector, which would send a drafter's keys before they are written"
        raise CheckpointError(f"--gamma adaptive: {expected}, got --kv-transfer-config; {REMEDY}")
    if environment.get(RUNNER) == "1":
        raise CheckpointError(f"--gamma adaptive: expected model runner V1 on a CPU, got {RUNNER}=1; unset it")


def _check_gpu(
    arguments: Sequence[str], eager: bool, install: VllmInstall | None, environment: Mapping[str, str]
) -> None:
    version = None if install is None else install.version
    if version is not None and _read_version(version) < SINCE:
        since = ".".join(map(str, SINCE))
        raise CheckpointError(
            f"--gamma adaptive: expected vLLM {since} or newer on a GPU, got {version}; update it, or take --gamma auto"
        )
    if eager:
        raise CheckpointError(f"--gamma adaptive: expected CUDA graphs on a GPU, got eager mode; {REMEDY}")
    if names_flag(arguments, "--enable-lora"):
        raise CheckpointError(f"--gamma adaptive: expected no LoRA, got --enable-lora; {REMEDY}")
    if find_several(arguments, PIPELINE):
        raise CheckpointError(f"--gamma adaptive: expected one pipeline stage, got several; {REMEDY}")
    if environment.get(RUNNER) == "0":
        raise CheckpointError(f"--gamma adaptive: expected model runner V2 on a GPU, got {RUNNER}=0; unset it")


def _read_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
