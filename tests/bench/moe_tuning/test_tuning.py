"""The command that measures tiles: its plan without a GPU, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from laguna_serve.bench.moe_tuning.__main__ import TuningConfig, choose, main, tune
from laguna_serve.bench.moe_tuning.result import Candidate, TileSizes
from laguna_serve.bench.moe_tuning.space import list_variants
from laguna_serve.kernels.sentinel_moe.configs import TABLE
from laguna_serve.kernels.sentinel_moe.tables import read_table


@pytest.mark.slow
def test_a_plan_is_compiled_for_a_gpu_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan", "--capability", "90", "--path", "decode", "--weights", "fp8", "--most", "2", "--threads", "1"]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["rows"]
    assert (result["plan"], result["device"]) == (True, "sm_90")
    assert row["candidates"][0]["tiles"] == row["tiles"]
    assert row["candidates"][0]["us"] == {}
    assert row["candidates"][0]["registers"][0] > 0
    assert read_table(tmp_path / "tiles.json", "sm_90")["decode", "fp8"] == TABLE["decode", "fp8"]


@pytest.mark.parametrize("key", [key for key in TABLE if key[1] != "fp32"], ids=str)
def test_variants_begin_with_the_shipped_row_and_differ(key: tuple[str, str]) -> None:
    variants = list(list_variants(*key))  # type: ignore[arg-type]
    assert variants[0] == TABLE[key]  # type: ignore[index]
    assert len(set(variants)) == len(variants) > 20
    assert key[1] != "fp8" or all(tiles.block_h <= 128 and tiles.block_n <= 128 for tiles in variants)


def test_the_least_sum_of_relative_medians_is_chosen() -> None:
    def candidate(members: int, one: list[float], eight: list[float]) -> Candidate:
        sizes = TileSizes(
            members=members, block_a=16, block_h=64, block_n=64, block_k=64, parts=1, warps=(2, 2), stages=(3, 3)
        )
        return Candidate(tiles=sizes, registers=(64, 64), shared_bytes=(1, 1), us={1: one, 8: eight})

    shipped = candidate(8, [10, 10, 99], [100, 100, 100])
    better_at_one = candidate(16, [8, 8, 8], [115, 115, 115])  # 0.8 + 1.15
    better_at_eight = candidate(32, [11, 11, 11], [95, 95, 95])  # 1.1 + 0.95
    assert choose([shipped, better_at_eight, better_at_one]).members == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "device: expected a GPU, got none; pass --plan"),
        ({"plan": True}, "--capability: expected one for a plan without a GPU, got none"),
        ({"plan": True, "capability": 81}, "--capability: expected one of 80, 86, 89, 90, 100, 120, got 81"),
    ],
)
def test_what_cannot_run_says_so(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tune(TuningConfig(out=tmp_path, **options))  # type: ignore[arg-type]
