"""What a γ sweep has stored: read, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.speculation.gamma_store import Advice, Drafting, find_advice, settle_gamma, store_advice


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


def test_gamma_is_settled_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settle_gamma("m", "d", 3, "probabilistic") == Drafting("d", 3, False, None, "probabilistic")
    assert settle_gamma("m", "d", "max", "greedy") == settle_gamma("m", "d", None, "greedy")
    assert settle_gamma("m", "d", "adaptive", "greedy") == Drafting("d", None, True, None, "greedy")
    with pytest.raises(CheckpointError, match="expected a sweep of this model"):
        settle_gamma("m", "d", "auto", "greedy")
    pays = Advice("m", "d", ((1, 8, 3), (9, 64, 0)), "2026-11-29")
    store_advice(pays)
    assert settle_gamma("m", "d", "auto", "greedy") == Drafting("d", 3, False, pays.schedule, "greedy", pays)
    loses = Advice("m", "d", ((1, 64, 0),), "2026-11-29")
    store_advice(loses)
    assert settle_gamma("m", "d", "auto", "probabilistic") == Drafting(None, None, False, None, "greedy", loses)
