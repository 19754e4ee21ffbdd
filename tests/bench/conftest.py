"""Fixtures of the ab.py tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ab_harness import PROMPTS, Answer, RunAb, common_flags
from mock_engine import Clock, MockEngine, Settings

from laguna_serve.bench import ab
from laguna_serve.bench.certificate import identity
from laguna_serve.bench.harness import plot
from laguna_serve.serving.client import completions, counters
from laguna_serve.serving.machine import rates
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning import launch


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(PROMPTS)))
    return path


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else together; tests that look at the picture say so."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(plot, "draw", lambda _result, path: path.write_bytes(b""))


@pytest.fixture(autouse=True)
def _counters_settle_soon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock engines count at once; real ones need not be asked more often than a user would."""
    if request.node.get_closest_marker("vllm") is None:
        monkeypatch.setattr(counters, "POLL_S", 0.01)


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are fake here, so whether there is memory for real ones does not matter."""
    monkeypatch.setattr(launch, "find_device", lambda _install: Device("cpu", "a roomy one", 64 << 30, 64 << 30))


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What torch would say of this machine, which takes seconds to ask; change it to change the machine."""
    found = {"torch's instruction set": "AVX512", "sentinel op": "avx512bf16, sources 01", "linear op": "not used"}
    monkeypatch.setattr(identity, "ask_torch", lambda: dict(found))
    return found


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache is the test's own, and the processor's rates need no measurement to be in it."""
    known = rates.Rates(bfloat16={"1": 1.0, "8": 1.0}, float32={"1": 2.0, "8": 2.0})
    monkeypatch.setattr(rates, "measure_rates", lambda: known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def draws() -> None:
    """Marks a test in which the picture is really drawn."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What requests take is what mocks that have this clock say; one request at a time."""
    clock = Clock()
    monkeypatch.setattr(completions, "time", clock)
    return clock


@pytest.fixture
def run_ab(tmp_path: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]) -> RunAb:
    """Run ab.py in this process on two fake engines; give exit status, last line, output."""

    def run(baseline: Settings, candidate: Settings, *flags: str) -> Answer:
        with MockEngine(baseline) as ours, MockEngine(candidate) as theirs:
            urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
            status = ab.main([*urls, *common_flags(prompts_file, tmp_path), *flags])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, captured.out + captured.err

    return run
