"""The numbers that an engine computes in where nobody says: the checkpoint's, or faster ones on a slow processor."""

from __future__ import annotations

from dataclasses import dataclass

from laguna_serve.kernels.isa import multiplies_bf16
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import show_size
from laguna_serve.serving.machine.rates import find_rates

AUTO, BF16, FP32 = "auto", "bfloat16", "float32"
# Of the machine's memory for float32 weights: the rest is for a drafter, keys and values, and a second engine.
MOST_OF_MEMORY = 0.4


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """vLLM's `--dtype`, and a line for people where it is not what they would expect."""

    dtype: str
    note: str | None = None


def choose_dtype(asked: str, stored: str, weight_bytes: int, device: Device) -> DtypeChoice:
    """Choose what to compute in. `stored`, `weight_bytes`: the target's numbers and their size.

    bfloat16, and float32 that vLLM would narrow to it, are float32 on a CPU without bf16 arithmetic that multiplies
    float32 faster, if that much fits. It follows from the machine, not from what is free at the moment, so that two
    engines of one model agree.
    """
    known = device.kind == "cpu" and bool(device.isa)
    if asked != AUTO or stored not in (BF16, FP32) or not known or multiplies_bf16(device.isa):
        return DtypeChoice(asked)
    rates = find_rates()
    if rates is None or not rates.prefers_float32:
        return DtypeChoice(asked)
    faster = f"no fast bfloat16 in this processor, which multiplies float32 {rates.gain:.1f} times as fast"
    wide = weight_bytes if stored == FP32 else 2 * weight_bytes
    if wide > MOST_OF_MEMORY * device.total_bytes:
        size = f"{show_size(wide)} of {show_size(device.total_bytes)}"
        return DtypeChoice(asked, f"dtype: bfloat16 all the same: {faster}, but its weights would take {size}")
    return DtypeChoice(FP32, f"dtype: float32: {faster} (--dtype overrides)")
