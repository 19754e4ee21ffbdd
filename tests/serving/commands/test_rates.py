"""Which type a processor multiplies fastest in: known by its instructions, else measured once and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.commands import rates
from laguna_serve.serving.commands.doctor import describe_rates
from laguna_serve.serving.commands.rates import LIMITS, Rates, find_rates, measure_rates, multiplies_bf16


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("isa", "has"),
    [
        (["cpu family 25", "model 17", "avx2", "avx512f", "avx512_bf16"], True),
        (["cpu family 6", "model 143", "avx2", "avx512f", "amx_bf16"], True),
        (["asimd", "bf16"], True),
        (["cpu family 25", "model 33", "avx2"], False),
        (["cpu family 6", "model 85", "avx2", "avx512f"], False),
        ([], False),
    ],
)
def test_bf16_arithmetic_by_instructions(isa: list[str], has: bool) -> None:
    assert multiplies_bf16(isa) is has


@pytest.mark.parametrize(("name", "value"), [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "avx2")])
def test_libraries_held_to_less_do_not_have_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not multiplies_bf16(["avx2", "avx512f", "avx512_bf16"])


def test_real_probe_times_every_case() -> None:
    measured = measure_rates()
    assert measured is not None
    assert measured.bfloat16.keys() == measured.float32.keys() == {1, 8}
    assert all(0 < ms < 1000 for ms in (*measured.bfloat16.values(), *measured.float32.values()))


def test_measured_once_and_again_where_the_file_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    result = Rates(bfloat16={1: 0.4, 8: 2.6}, float32={1: 0.3, 8: 0.3})

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
    monkeypatch.setattr(rates, "measure_rates", lambda: Rates(bfloat16={1: 1.0}, float32={1: 0.5}))
    found = find_rates()
    assert found is not None
    assert found.gain == 2.0


@pytest.mark.parametrize(
    ("ms", "advice"),
    [(0.5, "float32 is 2.0 times as fast; serve with --dtype float32"), (2.0, "float32 is still 2.0 times slower")],
)
def test_doctor_says_what_to_serve_in(ms: float, advice: str) -> None:
    assert advice in describe_rates(Rates(bfloat16={1: 1.0}, float32={1: ms}))
