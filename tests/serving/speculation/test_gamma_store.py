"""What a γ sweep has stored: read, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.speculation.gamma_store import Advice, find_advice, store_advice


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
