"""bench/moe.py on small shapes: what it counts, what it refuses, and that a wrong kernel gets no speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from laguna_serve.bench import moe
from laguna_serve.bench.moe_layer import layers as moe_layers
from laguna_serve.bench.moe_layer import timing
from laguna_serve.bench.moe_layer.layers import Batch, Router, Shape
from laguna_serve.bench.moe_layer.result import MoeResult, MoeRow
from laguna_serve.serving.kit.environment import read_environment
from laguna_serve.serving.kit.results import read_result, write_result

SMALL = ["--device", "cpu", "--experts", "16", "--hidden", "64", "--intermediate", "64", "--block", "16", "--topk", "2"]
SHAPE = Shape(16, 64, 64, 16, 2, torch.float32, torch.device("cpu"))


def run(tmp_path: Path, *flags: str) -> int:
    small = ["--tokens", "1,20", "--pruning", "0,0.5", "--routing", "uniform", "--repeats", "3"]
    return moe.main([*SMALL, *small, "--out", str(tmp_path / "out"), *flags])


@pytest.mark.slow
def test_run_writes_table_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--routing", "uniform,skewed") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = json.loads((tmp_path / "out" / "moe.json").read_text(encoding="utf-8"))
    assert last == stored
    assert stored["schema"] == "laguna_serve.moe/1"
    assert stored["refused"] == []
    assert stored["settings"]["path"] in {path.name for path in moe_layers.cpu.load().paths}
    assert len(stored["rows"]) == 16
    assert {row["weights"] for row in stored["rows"]} == {"full", "fp8"}
    for row in stored["rows"]:
        assert row["us"] > 0
        assert row["floor_us"] > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["ratio_ci95"][0] <= row["ratio"] <= row["ratio_ci95"][1]
    assert (tmp_path / "out" / "moe.png").stat().st_size > 10_000
    assert "÷ vLLM (95%)" in (tmp_path / "out" / "moe.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_runs_without_vllm(dtype: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--no-vllm", "--dtype", dtype) == 0
    rows = json.loads((tmp_path / "out" / "moe.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["ratio"] is None for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda out, T: out * 1.01, "expected an error of at most"),
        (lambda out, T: out.index_fill(1, torch.tensor([3]), float("nan")), "expected an error of at most"),
        (lambda out, T: out * (1 + 1e-6 * T), "expected row 0 alone to equal row 0 of the batch bit for bit"),
    ],
    ids=["wrong", "NaN", "rows depend on the batch"],
)
def test_wrong_kernel_gets_no_speed(
    fault: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = moe_layers.run_kernel
    monkeypatch.setattr(moe_layers, "run_kernel", lambda *args: fault(right(*args), len(args[1].x)))
    assert run(tmp_path, "--dtype", "float32", "--tokens", "4", "--weights", "full") == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["refused"]) == 2
    assert all(reason in text for text in result["refused"])
    assert all("us" not in row for row in result["rows"])


def test_bytes_are_the_kept_blocks_of_the_distinct_experts() -> None:
    layer = moe_layers.make_layer(SHAPE, 0.5, 0, with_zeroed=False)
    ids = torch.tensor([[3, 5], [5, 3], [3, 9]], dtype=torch.int32)
    batch = Batch(torch.zeros(3, 64), torch.zeros(3, 2), ids)
    widths = layer.block_start.diff()
    kept = int(widths[3] + widths[5] + widths[9])
    assert moe_layers.bytes_read(layer, batch) == kept * 3 * 16 * 64 * 4 + 2 * 3 * 64 * 4 + 3 * 2 * 8


def test_zeroed_and_compact_layers_are_the_same_function() -> None:
    layer = moe_layers.make_layer(SHAPE, 0.4, 1, with_zeroed=True)
    assert len(layer.w2_blocks) == 16 * 4 - int(0.4 * 64)
    batch = Router(SHAPE, "uniform", 0).draw(9)
    assert layer.w13 is not None
    assert layer.w2 is not None
    out = torch.zeros(9, 64)
    for t in range(9):
        for weight, expert in zip(batch.weights[t], batch.ids[t], strict=True):
            gate, up = (layer.w13[expert] @ batch.x[t]).chunk(2)
            out[t] += weight * (layer.w2[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(moe_layers.run_kernel(layer, batch, SHAPE), out, atol=1e-5, rtol=1e-4)


def test_skewed_routing_has_the_stated_number_of_effective_experts() -> None:
    shape = Shape(256, 64, 64, 16, 8, torch.float32, torch.device("cpu"))
    skewed, uniform = Router(shape, "skewed", 0), Router(shape, "uniform", 0)
    assert skewed.effective_experts == pytest.approx(0.6 * 256, rel=1e-6)
    assert uniform.effective_experts == pytest.approx(256)
    ids = uniform.draw(4000).ids
    assert all(len(set(row)) == 8 for row in ids[:100].tolist())
    shares = torch.bincount(ids.flatten().long(), minlength=256) / ids.numel()
    assert math.exp(-float((shares * shares.log()).sum())) == pytest.approx(256, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device: expected a CUDA device, got none"),
        (["--block", "48"], "shape: expected multiples of 16"),
        (["--hidden", "50"], "shape: expected multiples of 16"),
        (["--topk", "17"], "--topk: expected at most 16, got 17"),
        (["--experts", "99999999"], "memory: expected"),
    ],
)
def test_impossible_request_is_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run(tmp_path, *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"moe.py: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [["--tokens", "0"], ["--tokens", "one"], ["--pruning", "1.0"], ["--routing", "hot"], ["--dtype", "int8"]],
)
def test_bad_flag_is_refused(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *flags)
    assert stopped.value.code == 2


@pytest.mark.slow
def test_interrupted_run_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_rows = timing.measure_rows
    calls = []

    def stop_at_the_third(*args: Any) -> list[MoeRow]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_rows(*args)

    monkeypatch.setattr(timing, "measure_rows", stop_at_the_third)
    assert run(tmp_path) == 130
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["partial"]
    assert len(first["rows"]) == 4
    calls.clear()
    assert run(tmp_path, "--resume") == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not second["partial"]
    assert second["rows"][:4] == first["rows"]
    assert len(second["rows"]) == 8
    assert len(calls) == 2
    before = json.loads((tmp_path / "out" / "moe.json").read_text())["rows"]
    assert run(tmp_path, "--resume", "--tokens", "20", "--pruning", "0.5") == 0
    kept = json.loads((tmp_path / "out" / "moe.json").read_text())["rows"]
    assert [(r["tokens"], r["pruning"], r["weights"], r["us"]) for r in kept] == [
        (r["tokens"], r["pruning"], r["weights"], r["us"]) for r in before
    ]
    assert kept == before, "those that were not asked for stay"
    assert "8/8" not in capsys.readouterr().err
    assert run(tmp_path, "--resume", "--block", "32") == 2
    assert "--resume: expected rows of block 32, got 16; pass another --out" in capsys.readouterr().err


def test_share_that_leaves_an_expert_nothing_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 4 blocks one stays; what else was asked for would have been measured before."""
    assert run(tmp_path, "--pruning", "0,0.8") == 2
    assert "--pruning: expected at most 0.75, as every expert keeps a block, got 0.8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_eight_bits_are_the_layer_within_their_rounding() -> None:
    layer = moe_layers.make_layer(
        Shape(4, 144, 32, 16, 2, torch.bfloat16, torch.device("cpu")), 0, 0, with_zeroed=False
    )
    narrow = moe_layers.quantise(layer)
    assert narrow.w13_scales is not None
    assert narrow.w13_scales.shape == (8, 2, 16, 2)
    values = narrow.w13_blocks.float() * narrow.w13_scales.repeat_interleave(128, -1)[..., :144]
    assert float((values - layer.w13_blocks.float()).norm() / layer.w13_blocks.float().norm()) < 0.04


@pytest.mark.slow
def test_kernels_are_timed_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = moe.MoeConfig(
        device="cpu",
        experts=16,
        hidden=64,
        intermediate=64,
        block=16,
        topk=2,
        tokens=(1,),
        pruning=(0.5,),
        routing=("uniform",),
        repeats=3,
        weights=("fp8",),
        vllm=False,
        out=tmp_path,
    )
    result = moe.time_kernels(config)
    assert [(row.tokens, row.refused, row.ratio) for row in result.rows] == [(1, None, None)]
    assert read_result(tmp_path / "moe.json", moe.MoeResult) == result
    assert capsys.readouterr().out == ""


def make_row(tokens: int, pruning: float = 0.0, us: float = 1.0) -> MoeRow:
    return MoeRow(
        tokens=tokens, pruning=pruning, routing="uniform", effective_experts=1.0, error=None, refused=None, us=us
    )


def test_rows_of_an_earlier_run_stay_whatever_this_one_has_come_to() -> None:
    """A run that was killed at its first row, or asked for fewer, left nothing of them."""
    measured = [make_row(8), make_row(1), make_row(1, 0.251), make_row(1, 0.25)]
    joined = moe.join_rows([make_row(1, us=2.0), make_row(4)], measured)
    assert [(row.pruning, row.tokens, row.us) for row in joined] == [
        (0.0, 1, 2.0),
        (0.0, 4, 1.0),
        (0.0, 8, 1.0),
        (0.25, 1, 1.0),
        (0.251, 1, 1.0),
    ]


def test_rows_of_another_processor_are_not_kept(tmp_path: Path) -> None:
    """The table named one machine over the figures of two."""
    shape = Shape(64, 2048, 512, 64, 8, torch.bfloat16, torch.device("cpu"))
    config = moe.MoeConfig(device="cpu", resume=True, out=tmp_path)
    environment = read_environment(["bench/moe.py"])
    earlier = MoeResult(
        environment=structs.replace(environment, isa=["cpu family 0", "model 1"]),
        settings=moe.describe(config, shape),
        bandwidth_gb_s={"copy": 1.0, "floor": 1.0},
        stock="none",
        rows=[make_row(1)],
        refused=[],
        partial=False,
    )
    write_result(tmp_path / "moe.json", earlier)
    with pytest.raises(timing.MoeBenchError, match=r"--resume: expected rows of .*, got .* cpu family 0 model 1; "):
        moe.time_kernels(config)
