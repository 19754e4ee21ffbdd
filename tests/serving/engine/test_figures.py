"""What an engine says of itself, from lines as vLLM writes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from laguna_serve.serving.engine.figures import EngineFigures, read_figures, read_freed
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.residence import launcher
from laguna_serve.serving.machine.memory import EngineMemory

GIB = 2**30
GPU_LOG = """\
(EngineCore pid=9) INFO 11-26 13:26:23 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: \
model='XS.2', speculative_config=None, dtype=torch.bfloat16, max_seq_len=2048
(EngineCore pid=9) INFO [gpu_model_runner.py:5150] Model loading took 62.4 GiB memory and 12.340000 seconds
(EngineCore pid=9) INFO 11-26 13:26:26 [gpu_worker.py:760] Available KV cache memory: 8.25 GiB
(EngineCore pid=9) INFO 11-26 13:26:26 [kv_cache_utils.py:2327] GPU KV cache size: 167,772 tokens, Maximum concurrency \
for 2,048 tokens per request: 81.92x
(EngineCore pid=9) INFO 11-26 13:26:40 [gpu_model_runner.py:6582] Graph capturing finished in 14 secs, took 0.61 GiB
(EngineCore pid=9) INFO [gpu_worker.py:1035] Free memory on device (78.0/79.1 GiB) on startup. Desired \
GPU memory utilization is (0.92, 72.8 GiB). Actual usage is 62.9 GiB for consumed memory (weights + non-torch), \
1.5 GiB for peak activation, and 0.61 GiB for CUDAGraph memory.
"""
CPU_LOG = """\
(EngineCore pid=9) INFO 11-26 13:26:23 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: \
kv_cache_dtype=auto, dtype=torch.float32, max_seq_len=2048
(EngineCore pid=9) INFO 11-26 13:27:23 [cpu_worker.py:260] Explicitly set (0.25/23.54) GiB for KV cache on node 0.
(EngineCore pid=9) INFO 11-26 13:27:23 [kv_cache_utils.py:2327] CPU KV cache size: 41,943 tokens, Maximum concurrency
"""


def test_gpu_engine_names_every_part(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(GPU_LOG)
    assert read_figures(tmp_path / "log") == EngineFigures(
        weights_bytes=round(62.4 * GIB),
        kv_cache_bytes=round(8.25 * GIB),
        kv_cache_tokens=167_772,
        graphs_bytes=round(0.61 * GIB),
        peak_activation_bytes=round(1.5 * GIB),
        dtype="bfloat16",
    )


def test_given_cache_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Initial free memory 78.0 GiB, reserved 4.0 GiB memory for KV Cache as specified by")
    assert read_figures(tmp_path / "log").kv_cache_bytes == 4 * GIB


def test_cpu_engine_says_less(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(CPU_LOG)
    expected = EngineFigures(kv_cache_bytes=GIB // 4, kv_cache_tokens=41_943, dtype="float32")
    assert read_figures(tmp_path / "log") == expected


def test_no_log_no_figures(tmp_path: Path) -> None:
    assert read_figures(tmp_path / "none") == EngineFigures()


def test_what_sleep_frees_is_said_each_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_freed(log) is None
    log.write_text("INFO Model loading took 62.40 GiB memory and 20 seconds\n")
    assert read_freed(log) is None
    for freed in ("70.10", "1,069.5"):
        with log.open("a") as file:
            file.write(f"INFO Sleep mode freed {freed} GiB memory, 1.20 GiB memory is still in use.\n")
    assert read_freed(log) == round(1069.5 * GIB)


def test_engine_asleep_is_what_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the driver tells no processes apart, and the log of the start says what it took awake."""
    log = tmp_path / "log"
    log.write_text("Model loading took 62.40 GiB memory\nGraph capturing finished in 9 secs, took 0.61 GiB\n")

    def measure(_pids: object) -> EngineMemory:
        return EngineMemory(processes=(), pss_bytes=3 * GIB, peak_rss_bytes=0, gpu_bytes=0)

    def put_to_sleep(_url: str, _level: int) -> None:
        with log.open("a") as file:
            file.write("Sleep mode freed 60.00 GiB memory, 1.20 GiB memory is still in use.\n")

    monkeypatch.setattr(launcher, "process_memory", measure)
    monkeypatch.setattr(launcher.sleep, "put_to_sleep", put_to_sleep)
    process = launcher.OwnedProcess("m", OwnedEngine(model="folder", sleep_level=1), log)
    process._engine = SimpleNamespace(base_url="http://x", pids=list)  # type: ignore[assignment]
    awake = process.measure()
    assert process.sleep() == awake - 60 * GIB
