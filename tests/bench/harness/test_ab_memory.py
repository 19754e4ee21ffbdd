"""What an A/B's engines say of their own memory and dtype, in its result and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from ab_harness import PROMPTS, RunAb, mock_launchers
from mock_engine import MockEngine, Settings

from laguna_serve.bench import ab
from laguna_serve.bench.arms.arms import Arm, ArmSpec

SAID = """\
Initializing a V1 LLM engine (v0.32.0) with config: model='m', dtype=torch.float16, max_seq_len=64
Model loading took 12.5 GiB memory and 3.000000 seconds
Available KV cache memory: 2.00 GiB
"""


def test_engine_names_parts_and_dtype(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flips = Settings(flips={PROMPTS[0]: 3})
    with mock_launchers(monkeypatch, Settings(), flips) as launcher:
        enter = launcher.__enter__

        def speak(self: object) -> object:
            self.log_path.write_text(SAID)  # type: ignore[attr-defined]
            return enter(self)  # type: ignore[arg-type]

        monkeypatch.setattr(launcher, "__enter__", speak)
        config = ab.AbConfig(
            model="somebody/theirs", draft="d", prompts=prompts_file, num_prompts=9, max_tokens=8, out=tmp_path / "out"
        )
        result = ab.compare(config)
    arm = result.arms["baseline"].engine
    assert arm is not None
    assert (arm.weights_bytes, arm.kv_cache_bytes, arm.graphs_bytes) == (round(12.5 * 2**30), 2 * 2**30, None)
    assert result.parity.dtype == "float16"
    table = (tmp_path / "out" / "ab.md").read_text()
    assert "| weights, GiB | 12.50 | 12.50 |" in table
    assert "graphs, GiB" not in table


def test_endpoint_says_nothing(run_ab: RunAb, prompts_file: Path, tmp_path: Path) -> None:
    with MockEngine() as engine:
        config = ab.AbConfig(
            baseline_url=engine.url, candidate_url=engine.url, prompts=prompts_file, num_prompts=9, max_tokens=8,
            out=tmp_path / "out",
        )  # fmt: skip
        assert ab.compare(config).arms["baseline"].engine is None


def test_memory_of_an_engine_that_is_gone_is_not_known(tmp_path: Path) -> None:
    """It was 0.00 GiB, in the table and in the file."""

    class Gone:
        log_path = tmp_path / "engine.log"

        def pids(self) -> list[int]:
            return [2**22 + 1]  # beyond Linux's largest

    assert Arm(ArmSpec("baseline", "b"), "http://127.0.0.1:9", None, Gone()).read_memory() is None  # type: ignore[arg-type]
