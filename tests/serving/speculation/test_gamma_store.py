"""What a γ sweep has stored: read, or refused in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.command import choose_settings
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.speculation.gamma_store import MEMORY_VARIABLE, Advice, find_advice, store_advice

TOY = Path(__file__).resolve().parents[2] / "toy"


def test_what_was_stored_is_found_and_an_empty_schedule_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    advice = Advice("m", "d", ((1, 8, 3), (9, 64, 0)), "2026-11-29")
    path = store_advice(advice)
    assert find_advice("m", "d") == advice
    path.write_text(path.read_text().replace("[[1, 8, 3], [9, 64, 0]]", "[]"))
    with pytest.raises(CheckpointError, match="an empty schedule"):
        find_advice("m", "d")


def test_what_an_adaptive_engine_learns_has_a_place_for_all_that_decides_its_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def place(config: EngineConfig, kind: str = "cpu") -> str | None:
        device = Device("cpu" if kind == "cpu" else "gpu", kind, 1 << 35, 1 << 34)
        settings = choose_settings(config, inspect(config), device)
        return next((setting.value for setting in settings if setting.name == MEMORY_VARIABLE), None)

    own = EngineConfig(model=f"{TOY}/teacher", draft=f"{TOY}/dflash", adaptive=True, gamma_memory=True)
    path = place(own)
    assert path is not None
    assert (Path(path).parent.parent.parent, path) == (tmp_path, place(own))
    monkeypatch.chdir(TOY)
    assert place(replace(own, model="teacher", draft="./dflash")) == path
    others = {
        place(replace(own, gamma=3)),
        place(replace(own, dtype="float32")),
        place(replace(own, enforce_eager=True)),
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    others.add(place(own))
    assert len(others - {path, None}) == 4
    assert place(replace(own, gamma_memory=False)) is None  # a benchmark's, which begins anew
    assert place(replace(own, adaptive=False)) is None
    assert place(own, "gpu") is None
