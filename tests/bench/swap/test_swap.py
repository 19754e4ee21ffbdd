"""bench/swap on mock engines as processes: every situation is what it is called; what cannot be measured is said."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest

from laguna_serve.bench.swap import run
from laguna_serve.bench.swap.result import SwapResult
from laguna_serve.bench.swap.run import SwapConfig, _Run, measure_swaps
from laguna_serve.serving.chat.vendor_defaults import NO_CONTRACT
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.engine import engine as engine_module
from laguna_serve.serving.gateway.run import Background
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import Launch, find_port

TESTS = Path(__file__).parents[2]
ENGINE = """
import sys
from aiohttp import web
from mock_engine import MockEngine, Settings
app = web.Application()
app.add_routes(MockEngine(Settings(models=(sys.argv[2],), requires=())).routes())
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


@pytest.fixture
def mock_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that need no checkpoint, as processes under the real supervisor."""

    def plan(config: EngineConfig, _key: str | None = None) -> Launch:
        port = find_port("127.0.0.1")
        command = [sys.executable, "-c", ENGINE, str(port), config.model_name]
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        return Launch(command, environment, f"http://127.0.0.1:{port}", None, NO_CONTRACT, ())

    monkeypatch.setattr(engine_module, "plan_launch", plan)
    monkeypatch.setattr(engine_module, "POLL_S", 0.02)
    monkeypatch.setattr(run, "check_launches", lambda _configs: None)
    monkeypatch.setattr(run, "plan_bytes", lambda _name, _table: 1 << 28)


@pytest.mark.slow
@pytest.mark.usefixtures("mock_engines")
def test_every_situation_is_asked_in_every_round(tmp_path: Path) -> None:
    result = measure_swaps(SwapConfig(model=("folder/a", "folder/b"), rounds=2, rest=0.01, out=tmp_path))
    counts = {(one.name, one.model): len(one.ttft_s) for one in result.situations}
    assert counts == {
        ("warm", "a"): 10,
        ("warm", "b"): 10,
        ("cold", "a"): 4,
        ("cold", "b"): 2,
        ("swap", "a"): 2,
        ("swap", "b"): 2,
        ("rested", "a"): 2,
        ("rested", "b"): 2,
        ("restart", "a"): 2,
        ("restart", "b"): 2,
    }
    medians = {(one.name, one.model): one.spread.median for one in result.situations}
    assert all(
        0 < medians["warm", name] < medians[kind, name]
        for kind in ("cold", "swap", "rested", "restart")
        for name in "ab"
    )
    assert msgspec.json.decode((tmp_path / "swap.json").read_bytes(), type=SwapResult) == result
    assert "| rested | the same, after it has been there for a while | a | 2 |" in (tmp_path / "swap.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("mock_engines")
def test_room_for_two_is_no_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADROOM", 3.0)
    with pytest.raises(EngineError, match=r"memory: expected room for one model in .* got \(loads, evictions\)"):
        measure_swaps(SwapConfig(model=("folder/a", "folder/b"), rounds=1, rest=0.01, out=tmp_path))


@pytest.mark.parametrize(("counts", "woken"), [((2, 1), True), ((2, 0), False), ((1, 0), False)])
def test_a_woken_engine_is_the_one_that_fell_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int], woken: bool
) -> None:
    """One that was ended for the other's room and started anew counted as woken, and so did one that stayed awake."""
    measured = _Run(SwapConfig(model=("folder/a", "folder/b"), sleep_level=1, out=tmp_path))
    measured.held_gib = {"a": 1.0, "b": 2.0}
    monkeypatch.setattr(run, "open_background", lambda _config: nullcontext(Background("", "", None)))  # type: ignore[arg-type]
    monkeypatch.setattr(measured, "_ask", lambda _name, _url: 1.0)
    models = {"a": {"loads": 2, "wakes": 1}, "b": dict(zip(("loads", "wakes"), counts, strict=True))}
    monkeypatch.setattr(run, "_read_models", lambda _gateway: models)
    refusal = pytest.raises(EngineError, match=r"expected 2.60 GiB to hold one model beside one asleep, got .*'b': \(")
    with nullcontext() if woken else refusal:
        measured.wake()
    assert measured.ttft_s == {("woken", "a"): [1.0], ("woken", "b"): [1.0]}


def test_two_models_are_needed_and_a_gpu_to_sleep_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for models in (("a",), ("a", "b", "c"), ("here/a", "there/a")):
        with pytest.raises(FlagError, match="--model: expected two checkpoints of different names, got "):
            SwapConfig(model=models, out=tmp_path)
    with pytest.raises(FlagError, match="--sleep-level: expected 0, 1 or 2, got 3"):
        SwapConfig(model=("a", "b"), sleep_level=3, out=tmp_path)
    for size in (-1.0, 0.0, float("nan")):
        with pytest.raises(FlagError, match="--kv-cache-gib: expected"):
            SwapConfig(model=("a", "b"), kv_cache_gib=size, out=tmp_path)
    monkeypatch.setattr(run, "require_device", lambda: type("Device", (), {"kind": "cpu"}))
    with pytest.raises(FlagError, match="--sleep-level: expected a GPU, got a CPU"):
        measure_swaps(SwapConfig(model=("a", "b"), sleep_level=1, out=tmp_path))


@pytest.mark.parametrize(
    ("model", "tokens", "line"),
    [
        ("nowhere", 8, "nowhere: expected an existing folder or a hub id"),
        ("dense", 256, "tokens of an answer: expected fewer than the 256 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, tokens: int, line: str
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "open_background", start)
    monkeypatch.setattr(run, "Engine", start)
    models = (str(TESTS / "toy" / "teacher"), str(TESTS / "toy" / model))
    with pytest.raises(EngineError, match=line):
        measure_swaps(SwapConfig(model=models, max_tokens=tokens, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
