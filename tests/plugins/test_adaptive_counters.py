"""What the engine's process counts, the server's /metrics show."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from laguna_serve.plugins.adaptive import counters
from laguna_serve.plugins.adaptive.counters import VARIABLE, open_counters, publish_counters


def test_steps_and_time_by_drafted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    monkeypatch.setenv(VARIABLE, "")
    publish_counters()
    path = Path(counters.os.environ[VARIABLE])
    assert path.exists()
    engine = open_counters()
    assert engine is not None
    assert not path.exists(), "its name is taken away, so that nothing is left behind"
    for _ in range(3):
        engine.add(0, 4, 0.25)
    engine.add(27, 4, 1.5)
    page = generate_latest(registry).decode()
    assert 'laguna:gamma_steps_total{drafted="0"} 3.0' in page
    assert 'laguna:gamma_seconds_total{drafted="0"} 0.75' in page
    assert 'laguna:gamma_seconds_total{drafted="7"} 1.5' in page


def test_without_a_server_nothing_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert open_counters() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert open_counters() is None
