"""How much memory an engine may take, decided from what is free now.

vLLM reserves a fixed share (0.92) of the whole device by default and refuses to start when less is free. On
a CPU that is the machine's own memory, so there the KV cache is sized in bytes instead (`--kv-cache-memory-bytes`
makes vLLM ignore the share); on a GPU the share is lowered to what is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB, show_size

# Torch, vLLM and their buffers in the four processes of a CPU engine: 2.4 GB measured with vLLM 0.32, rounded up for
# compilation.
ENGINE_BYTES = 3 * 10**9
# A further rank's process, without weights and KV cache: 0.4 GB measured in eager mode, rounded up as above.
RANK_BYTES = 10**9
# On a CPU the KV cache is written when it is made, so that every byte of it is really taken.
MIN_KV_BYTES = GIB // 4
# Of what is left after the engine and the weights: another engine or the user's own work needs the rest.
MAX_KV_SHARE = 0.5
MAX_GPU_SHARE = 0.92
# What a share is rounded down to: of a hundredth a large device loses gigabytes, and vLLM takes no share of 0.
SHARE_STEP = 0.0001
# CUDA context and the allocator's rounding, which the share does not cover.
GPU_CONTEXT_BYTES = GIB


class BudgetError(ValueError):
    """Too little memory for an engine, as one line."""


def plan_memory(
    device: Device, *, weight_bytes: int, wanted_kv_bytes: int, kv_cache_gib: float | None, ranks: int = 1
) -> list[str]:
    """Plan the memory arguments for vLLM, which are for each rank.

    Args:
        device: where the engine runs, with its free bytes.
        weight_bytes: of the target and the drafter as they will lie in a rank's memory.
        wanted_kv_bytes: what all sequences would need at full length; more is of no use.
        kv_cache_gib: the user's choice, in GiB, or None.
        ranks: processes that compute, all of which a CPU holds in one memory.
    Raises:
        BudgetError: less is free than the engine needs.
    """
    if kv_cache_gib is not None and not (kv_cache_gib > 0 and math.isfinite(kv_cache_gib * GIB)):
        raise BudgetError(
            f"KV cache: expected more than 0 GiB, got {kv_cache_gib}; leave it out for an automatic choice"
        )
    if device.kind == "gpu":
        return _plan_gpu(device, weight_bytes, kv_cache_gib)
    kv_bytes = MIN_KV_BYTES if kv_cache_gib is None else int(kv_cache_gib * GIB)
    engine_bytes = ENGINE_BYTES + (ranks - 1) * RANK_BYTES
    taken = engine_bytes + ranks * weight_bytes
    parts = {"engine": engine_bytes, "weights": ranks * weight_bytes, "KV cache": ranks * kv_bytes}
    _require(device, parts, "" if ranks == 1 else f" of {ranks} ranks")
    if kv_cache_gib is None:
        left = (device.free_bytes - taken) // ranks
        kv_bytes = max(MIN_KV_BYTES, min(wanted_kv_bytes, int(left * MAX_KV_SHARE)))
    return ["--kv-cache-memory-bytes", str(kv_bytes)]


def _plan_gpu(device: Device, weight_bytes: int, kv_cache_gib: float | None) -> list[str]:
    kv_bytes = MIN_KV_BYTES if kv_cache_gib is None else int(kv_cache_gib * GIB)
    _require(device, {"context": GPU_CONTEXT_BYTES, "weights": weight_bytes, "KV cache": kv_bytes})
    steps = int((device.free_bytes - GPU_CONTEXT_BYTES) / device.total_bytes / SHARE_STEP)
    share = min(MAX_GPU_SHARE, max(1, steps) * SHARE_STEP)
    arguments = ["--gpu-memory-utilization", f"{share:.4f}"]
    return arguments if kv_cache_gib is None else [*arguments, "--kv-cache-memory-bytes", str(kv_bytes)]


def _require(device: Device, parts: Mapping[str, int], whose: str = "") -> None:
    if (needed := sum(parts.values())) > device.free_bytes:
        listed = " + ".join(f"{show_size(size)} {name}" for name, size in parts.items())
        expected = f"expected {show_size(needed)} free ({listed}{whose})"
        remedy = "stop another process or use a smaller model or KV cache"
        raise BudgetError(f"memory of {device.name}: {expected}, got {show_size(device.free_bytes)}; {remedy}")
