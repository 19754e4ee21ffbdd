"""What an engine computes in by default: the checkpoint's numbers, or float32 where that is faster and fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from laguna_serve.serving.machine import dtype
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.dtype import DtypeChoice, choose_dtype
from laguna_serve.serving.machine.rates import LIMITS, Rates

GIB = 1 << 30
HASWELL = Device("cpu", "cpu", 64 * GIB, 2 * GIB, isa=("fpu", "avx2"))
SLOW = Rates(bfloat16={"1": 0.4, "8": 2.6}, float32={"1": 0.3, "8": 0.3})
OURS = Rates(bfloat16={"1": 0.4, "8": 2.6}, float32={"1": 0.3, "8": 0.3}, kernel={"1": 0.2, "8": 0.3}, path="avx2")


CLOSE = Rates(bfloat16={"1": 0.31, "8": 0.31}, float32={"1": 0.3, "8": 0.3})


@pytest.fixture(autouse=True)
def _no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


def choose(
    monkeypatch: pytest.MonkeyPatch, rates: Rates | None, asked: str, stored: str, device: Device
) -> DtypeChoice:
    monkeypatch.setattr(dtype, "find_rates", lambda: rates)
    return choose_dtype(asked, stored, 4 * GIB, device)


def test_faster_float32_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, SLOW, "auto", "bfloat16", HASWELL)
    assert choice.dtype == "float32"
    assert choice.note is not None
    assert "float32 5.0 times as fast (--dtype overrides)" in choice.note


def test_what_does_not_fit_is_not_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, SLOW, "auto", "bfloat16", replace(HASWELL, total_bytes=16 * GIB))
    assert choice.dtype == "auto"
    assert choice.note is not None
    assert "would take 8.0 GiB of 16.0 GiB" in choice.note


def test_what_is_free_at_the_moment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two engines is planned while the first holds its memory."""
    first = choose(monkeypatch, SLOW, "auto", "bfloat16", HASWELL)
    assert first == choose(monkeypatch, SLOW, "auto", "bfloat16", replace(HASWELL, free_bytes=0))


@pytest.mark.parametrize(
    ("rates", "asked", "stored", "device"),
    [
        (SLOW, "bfloat16", "bfloat16", HASWELL),
        (SLOW, "float16", "bfloat16", HASWELL),
        (SLOW, "auto", "float16", HASWELL),
        (SLOW, "auto", "bfloat16", replace(HASWELL, isa=("avx2", "avx512f", "avx512_bf16"))),
        (SLOW, "auto", "bfloat16", replace(HASWELL, isa=())),
        (SLOW, "auto", "bfloat16", replace(HASWELL, kind="gpu")),
        (OURS, "auto", "bfloat16", HASWELL),
        (CLOSE, "auto", "bfloat16", HASWELL),
        (None, "auto", "bfloat16", HASWELL),
    ],
    ids=[
        "asked",
        "asked otherwise",
        "fp16",
        "bf16 arithmetic",
        "unknown",
        "gpu",
        "our kernel",
        "hardly faster",
        "not measured",
    ],
)
def test_otherwise_it_stays(
    monkeypatch: pytest.MonkeyPatch, rates: Rates | None, asked: str, stored: str, device: Device
) -> None:
    assert choose(monkeypatch, rates, asked, stored, device) == DtypeChoice(asked)


@pytest.mark.parametrize("path", ["amx", "avx512bf16", "neonbf16", ""])
def test_a_path_that_multiplies_bfloat16_is_no_limit(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("LAGUNA_CPU_ISA", path)
    fast = replace(HASWELL, isa=("avx2", "avx512f", "avx512_bf16", "amx_bf16"))
    assert choose(monkeypatch, SLOW, "auto", "bfloat16", fast) == DtypeChoice("auto")


def test_no_measurement_where_nothing_hangs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> Rates:
        raise AssertionError("measured")

    monkeypatch.setattr(dtype, "find_rates", measure)
    assert choose_dtype("float32", "bfloat16", GIB, HASWELL).dtype == "float32"
