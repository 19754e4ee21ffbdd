"""Which type a processor multiplies fastest in: known by its instructions, else measured once and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.kernels.isa import VARIABLE, uses_linear_op
from laguna_serve.serving.machine import rates
from laguna_serve.serving.machine.rates import (
    LIMITS,
    PROBE,
    Rates,
    describe_rates,
    find_rates,
    list_rates,
    measure_rates,
)


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("held", [True, False])
def test_real_probe_times_every_case(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if held:
        monkeypatch.setenv(VARIABLE, "portable")
    measured = measure_rates()
    assert measured is not None
    arms = [measured.bfloat16, measured.float32, *([measured.kernel] if measured.kernel is not None else [])]
    assert all(arm.keys() == {"1", "8"} for arm in arms)
    assert all(0 < ms < 1000 for arm in arms for ms in arm.values())
    assert measured.torch_isa
    assert (measured.path == "portable") == held
    assert (measured.kernel is not None) == uses_linear_op()


def test_measured_once_and_again_where_the_file_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    result = Rates(bfloat16={"1": 0.4, "8": 2.6}, float32={"1": 0.3, "8": 0.3})

    def measure() -> Rates:
        calls.append(1)
        return result

    monkeypatch.setattr(rates, "measure_rates", measure)
    assert find_rates() == find_rates() == result
    assert len(calls) == 1
    (kept,) = (tmp_path / "laguna-serve" / "rates").iterdir()
    kept.write_text("{")
    assert find_rates() == result
    assert len(calls) == 2
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other settings are other rates
    find_rates()
    assert len(calls) == 3


def test_rates_are_had_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "laguna-serve").write_text("a file where the folder should be")
    monkeypatch.setattr(rates, "measure_rates", lambda: Rates(bfloat16={"1": 1.0}, float32={"1": 0.5}))
    found = find_rates()
    assert found is not None
    assert found.gain == 2.0


@pytest.mark.parametrize(
    ("float32", "kernel", "bf16", "says"),
    [
        (0.5, None, False, "no fast bfloat16 in this processor: float32 is 2.0 times as fast"),
        (2.0, None, False, "no fast bfloat16 in this processor; float32 is 0.5 times as fast"),
        (0.5, 0.25, False, "by laguna_serve::linear (avx2), 4.0 times as fast as torch's, 2.0 times as float32"),
        (0.5, 0.8, False, "float32 is 1.6 times as fast"),
        (0.5, 0.25, True, "by laguna_serve::linear (avx2), 4.0 times as fast as torch's, 2.0 times as float32"),
        (2.0, None, True, "in the processor's own arithmetic, 2.0 times as fast as float32"),
    ],
)
def test_said_in_words(float32: float, kernel: float | None, bf16: bool, says: str) -> None:
    of = Rates(
        bfloat16={"1": 1.0}, float32={"1": float32}, kernel=None if kernel is None else {"1": kernel}, path="avx2"
    )
    assert says in describe_rates(of, bf16=bf16)
    assert f"float32 {float32:.2f}" in list_rates(of)


def test_a_probe_without_torch_has_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "PROBE", PROBE.replace("import torch\n", "import no_such_torch\n", 1))
    assert measure_rates() is None
