"""Memory arguments: enough to start, never more than is free."""

from __future__ import annotations

import pytest

from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.budget import ENGINE_BYTES, MIN_KV_BYTES, RANK_BYTES, BudgetError, plan_memory


def cpu(free_bytes: int) -> Device:
    return Device("cpu", "cpu", 64 * GIB, free_bytes)


def plan(device: Device, *, weights: int = 0, wanted: int = 1 << 50, gib: float | None = None) -> dict[str, str]:
    arguments = plan_memory(device, weight_bytes=weights, wanted_kv_bytes=wanted, kv_cache_gib=gib)
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@pytest.mark.parametrize(
    ("free_bytes", "weights", "wanted", "expected"),
    [
        (ENGINE_BYTES + MIN_KV_BYTES, 0, 1 << 50, MIN_KV_BYTES),
        (ENGINE_BYTES + 8 * GIB, 0, 1 << 50, 4 * GIB),
        (ENGINE_BYTES + 8 * GIB, 6 * GIB, 1 << 50, GIB),
        (ENGINE_BYTES + 8 * GIB, 0, 3 * GIB, 3 * GIB),
        (ENGINE_BYTES + 8 * GIB, 0, 5, MIN_KV_BYTES),
    ],
    ids=["just-enough", "half-of-the-rest", "weights-come-first", "as-wanted", "at-least"],
)
def test_cpu_cache_takes_half_of_the_rest_at_most(free_bytes: int, weights: int, wanted: int, expected: int) -> None:
    assert plan(cpu(free_bytes), weights=weights, wanted=wanted) == {"--kv-cache-memory-bytes": str(expected)}


def test_ranks_share_a_cpus_memory() -> None:
    free = ENGINE_BYTES + 2 * RANK_BYTES + 3 * 5 * GIB
    arguments = plan_memory(cpu(free), weight_bytes=GIB, wanted_kv_bytes=1 << 50, kv_cache_gib=None, ranks=3)
    assert arguments == ["--kv-cache-memory-bytes", str(2 * GIB)]
    with pytest.raises(BudgetError, match=r"3\.0 GiB weights \+ 15\.0 GiB KV cache of 3 ranks"):
        plan_memory(cpu(free), weight_bytes=GIB, wanted_kv_bytes=1 << 50, kv_cache_gib=5.0, ranks=3)


@pytest.mark.parametrize("gib", [None, 2.0])
def test_too_little_memory_is_refused_with_the_sum(gib: float | None) -> None:
    with pytest.raises(BudgetError, match=r"expected .* GiB free \(2\.8 GiB engine \+ 1\.0 GiB weights .*got 1\.0 GiB"):
        plan(cpu(GIB), weights=GIB, gib=gib)


@pytest.mark.parametrize("gib", [0.0, -1.0, float("nan"), float("inf")])
def test_empty_cache_is_refused(gib: float) -> None:
    with pytest.raises(BudgetError, match="expected more than 0 GiB"):
        plan(cpu(64 * GIB), gib=gib)


@pytest.mark.parametrize(("free_gib", "expected"), [(80, "0.9200"), (41, "0.5000")])
def test_gpu_share_is_lowered_to_what_is_free(free_gib: int, expected: str) -> None:
    gpu = Device("gpu", "NVIDIA H100", 80 * GIB, free_gib * GIB)
    assert plan(gpu) == {"--gpu-memory-utilization": expected}
    assert plan(gpu, gib=4)["--kv-cache-memory-bytes"] == str(4 * GIB)


def test_gpu_that_is_nearly_full_gives_a_share_that_holds_the_engine() -> None:
    gpu = Device("gpu", "NVIDIA B300", 288 * GIB, 2 * GIB)
    for gib in (None, 0.5):
        share = float(plan(gpu, weights=GIB // 4, gib=gib)["--gpu-memory-utilization"])
        assert GIB // 2 <= share * gpu.total_bytes <= GIB
    tiny = plan(Device("gpu", "NVIDIA B300", 288 * GIB, GIB + (1 << 20)), gib=1e-4)
    assert float(tiny["--gpu-memory-utilization"]) > 0


def test_gpu_without_room_for_a_kv_cache_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"256\.0 MiB KV cache\), got 1\.1 GiB"):
        plan(Device("gpu", "NVIDIA B300", 288 * GIB, GIB + GIB // 8), weights=1 << 20)


def test_gpu_without_room_for_the_weights_is_refused() -> None:
    with pytest.raises(BudgetError, match="memory of NVIDIA H100"):
        plan(Device("gpu", "NVIDIA H100", 80 * GIB, 40 * GIB), weights=62 * GIB)
