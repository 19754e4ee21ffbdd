"""What every benchmark does alike: a folder that cannot be one is refused at once, a run that was cut short says so."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from laguna_serve.bench.diffusion.report import render_text as render_diffusion
from laguna_serve.bench.diffusion.result import DiffusionResult
from laguna_serve.bench.linear.result import LinearResult
from laguna_serve.bench.linear.run import render_text as render_linear
from laguna_serve.bench.moe_layer.report import render_text as render_moe
from laguna_serve.bench.moe_layer.result import MoeResult
from laguna_serve.bench.prefix.report import render_text as render_prefix
from laguna_serve.bench.prefix.result import PrefixCacheResult
from laguna_serve.serving.kit.results import read_result
from laguna_serve.serving.kit.run_dir import hold_folder
from laguna_serve.serving.kit.tables import INTERRUPTED_RUN

ROOT = Path(__file__).resolve().parents[3]
TOY, RESULTS = ROOT / "tests" / "toy", ROOT / "bench" / "results"
PROMPTS = ["--prompts", str(TOY / "prompts.jsonl")]
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash"), *PROMPTS]
LLADA = ["--model", str(TOY / "llada"), "--proposals", str(TOY / "llada-proposals"), *PROMPTS]
BENCHMARKS: dict[str, list[str]] = {
    "ab": PAIR,
    "acceptance.__main__": PAIR,
    "campaign": ["--rehearse"],
    "certify": PAIR,
    "diffusion.run": LLADA,
    "exactness.__main__": LLADA,
    "fuzz": ["--model", str(TOY / "teacher"), "--minutes", "0"],
    "gamma_sweep": PAIR,
    "gateway": [],
    "linear.run": ["--shapes", "32x16", "--rows", "1"],
    "moe": ["--device", "cpu", "--no-vllm"],
    "moe_tuning.__main__": ["--plan", "--capability", "90"],
    "prefix_cache": PAIR,
    "rollouts": PAIR,
    "routing.__main__": ["--quick"],
    "sampling": PAIR,
    "soak": [],
    "step_cost.run": PAIR,
    "swap.run": ["--model", str(TOY / "teacher"), "--model", str(TOY / "dense")],
}

IMPORTS_VLLM = ("diffusion.run", "moe_tuning.__main__")
# Of one every sweep has its folder, one has its own test, and the others compute for seconds and then write.
TOGETHER = ("acceptance.__main__", "campaign", "moe_tuning.__main__", "routing.__main__")


def marked(name: str) -> Any:
    """Mark a benchmark whose import takes seconds as slow."""
    return pytest.param(name, marks=[pytest.mark.slow] * (name in IMPORTS_VLLM))


@pytest.mark.parametrize("name", [marked(name) for name in BENCHMARKS])
def test_a_folder_that_cannot_be_one_is_refused_with_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in its place, or above it: of half of them the line was `out: File exists`."""
    (tmp_path / "file").write_text("mine")
    main = importlib.import_module(f"laguna_serve.bench.{name}").main
    for out in ("file", "file/below"):
        assert main([*BENCHMARKS[name], "--out", str(tmp_path / out)]) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert f"error: --out {tmp_path / out}: expected" in line
        assert line.endswith(f"expected a folder, got the file {tmp_path / 'file'}; choose another")
        assert before == []
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [marked(name) for name in BENCHMARKS if name not in TOGETHER])
def test_a_second_run_is_kept_out_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It wrote to the same files and logs, and the first one ended when it noticed, or nobody did."""
    main = importlib.import_module(f"laguna_serve.bench.{name}").main
    with hold_folder(tmp_path / "out"):
        assert main([*BENCHMARKS[name], "--out", str(tmp_path / "out")]) == 2
        assert list((tmp_path / "out").iterdir()) == []
    line = capsys.readouterr().err.splitlines()[-1]
    who = f"another run at it (process {os.getpid()})"
    assert line.endswith(f"{tmp_path / 'out'}: expected to write alone, got {who}; wait for its end")


@pytest.mark.parametrize(
    ("file", "kind", "render"),
    [
        ("toy-diffusion/diffusion.json", DiffusionResult, render_diffusion),
        ("linear-avx2-cpu/linear.json", LinearResult, render_linear),
        ("moe-cpu/moe.json", MoeResult, render_moe),
        ("toy-prefix-cache/prefix_cache.json", PrefixCacheResult, render_prefix),
    ],
)
def test_a_run_that_was_cut_short_says_so(file: str, kind: Any, render: Callable[[Any], str]) -> None:
    result = read_result(RESULTS / file, kind)
    assert INTERRUPTED_RUN not in render(result)
    assert render(msgspec.structs.replace(result, partial=True)).splitlines()[-1] == INTERRUPTED_RUN
