"""What a process that vLLM starts sees of an installation, as probe.py prints it."""

from __future__ import annotations

import msgspec


class EntryPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Our entry point in vLLM's group of plugins.

    Attributes:
        found: it is installed.
        allowed_plugins: $VLLM_PLUGINS, and `allowed`: it lets ours in.
        error: of importing it.
    """

    found: bool
    value: str | None
    allowed_plugins: str | None
    allowed: bool
    error: str | None


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """Which class should serve an architecture, and which does: "module:Class", or "vllm" for any of vLLM's own."""

    expected: str
    actual: str | None
    error: str | None


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a process that vLLM starts sees (probe.py).

    Attributes:
        checked_vllm: the first and last version that ours is for.
        cpu_kernels: the instructions that the experts' kernels use on this CPU; None on a GPU.
        gpu_error: of computing on the GPU; None on a CPU.
    """

    python: str
    executable: str
    versions: dict[str, str | None]
    checked_vllm: tuple[str, str] | None
    vllm_error: str | None
    platform: str | None
    entry_point: EntryPoint
    register_error: str | None
    architectures: dict[str, Architecture]
    cpu_kernels: str | None = None
    gpu_error: str | None = None
