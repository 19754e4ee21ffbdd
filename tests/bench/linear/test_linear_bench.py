"""bench/linear on small matrices: what it writes, what it refuses, and that a wrong kernel gets no speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laguna_serve.bench.linear import run as command
from laguna_serve.bench.linear import timing
from laguna_serve.bench.linear.result import LinearResult
from laguna_serve.kernels.linear import linear
from laguna_serve.serving.kit.results import read_result


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SPREAD_BYTES", 1 << 16)
    monkeypatch.setattr(timing, "FEWEST_CALLS", 3)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert threads


def call(tmp_path: Path, *flags: str) -> int:
    small = ["--shapes", "32x16,8x40", "--rows", "1,5", "--seconds", "0"]
    return command.main([*small, "--no-vllm", "--out", str(tmp_path / "out"), *flags])


def test_run_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out" / "linear.json").read_text(encoding="utf-8"))
    result = read_result(tmp_path / "out" / "linear.json", LinearResult)
    assert [row.name for row in result.rows] == ["32x16, 1 rows", "32x16, 5 rows", "8x40, 1 rows", "8x40, 5 rows"]
    assert result.refused == []
    for row in result.rows:
        assert row.against_float32_ci95[0] <= row.against_float32 <= row.against_float32_ci95[1]  # type: ignore[index, operator]
        assert row.gb_s == pytest.approx(2 * row.inputs * row.outputs / row.kernel_us / 1e3)  # type: ignore[operator]
    assert "× fp32 (95%)" in (tmp_path / "out" / "linear.md").read_text(encoding="utf-8")


@pytest.mark.vllm
def test_vllms_layers_take_turns_where_they_are_asked(tmp_path: Path) -> None:
    flags = ["--shapes", "32x64", "--rows", "3", "--seconds", "0", "--out", str(tmp_path / "out")]
    assert command.main(flags) == 0
    (row,) = read_result(tmp_path / "out" / "linear.json", LinearResult).rows
    assert row.vllm_us > 0  # type: ignore[operator]
    assert row.against_vllm_ci95[0] <= row.against_vllm <= row.against_vllm_ci95[1]  # type: ignore[index, operator]
    assert "| – |" not in (tmp_path / "out" / "linear.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda out, rows: out * 1.1, "expected an error of at most"),
        (lambda out, rows: out.index_fill(0, torch.tensor([0]), float("nan")), "expected an error of at most"),
        (lambda out, rows: out * (1 + 2**-8 * (rows > 1)), "expected the last row alone to equal"),
    ],
    ids=["wrong", "NaN", "rows depend on the batch"],
)
def test_wrong_result_gets_no_speed(
    fault: Callable[[torch.Tensor, int], torch.Tensor], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "linear", lambda x, weight: fault(linear(x, weight).float(), len(x)).bfloat16())
    assert call(tmp_path, "--rows", "5") == 1
    result = read_result(tmp_path / "out" / "linear.json", LinearResult)
    assert all(reason in why for why in result.refused)
    assert len(result.refused) == len(result.rows) == 2


def test_no_compiler_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "load_library", lambda: None)
    assert call(tmp_path) == 2
    assert "expected it to build" in capsys.readouterr().err


def test_no_vllm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.utils", None)
    assert command.main(["--shapes", "32x16", "--seconds", "0", "--out", str(tmp_path / "out")]) == 2
    assert "pass --no-vllm" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["160", "0x4", "4x", "4X4"])
def test_what_is_no_shape_is_refused(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(tmp_path, "--shapes", shape)
    assert ended.value.code == 2
    assert "like 2048x8192" in capsys.readouterr().err


def test_median_is_not_moved_by_a_call_that_was_stopped() -> None:
    ratio, (low, high) = timing.estimate_median([2.0] * 40 + [500.0], [1.0] * 41)
    assert ratio == low == high == 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "1x1"], "--shapes: expected 256 weights or more, got 1x1"),
        (["--shapes", "9000000x9000000"], "9000000x9000000 with 5 rows, which takes"),
        (["--rows", "9999999999999"], "32x16 with 9999999999999 rows, which takes"),
        (["--threads", "100000"], "--threads: expected at most 1024, got 100000"),
        (["--seconds", "-1"], "--seconds: expected at least 0, got -1"),
    ],
)
def test_what_would_not_end_is_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = call(tmp_path, *flags)
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
