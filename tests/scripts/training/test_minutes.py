"""Minutes of trainings that were stopped and gone on with: all of them count."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.scripts.training.dense import work as dense
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.scripts.training.ranks import Ranks


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def run_for(clock: Clock, file: Path, seconds: float, *, stopped: bool = False, begun: bool = True) -> float:
    """Train for so long, to the end or until Ctrl-C; the minutes that the result would have."""
    with count_minutes(file, lambda: begun, clock) as tell:
        clock.now += seconds
        if stopped:
            raise KeyboardInterrupt
        return tell()


def test_runs_that_were_stopped_count(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / MINUTES
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_for(clock, file, 90, stopped=True)
        clock.now += 1e5  # nobody trains
    assert run_for(clock, file, 60) == 4.0
    file.write_text("half a nu")
    assert run_for(clock, file, 60) == 1.0


def test_a_folder_that_was_not_begun_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_for(Clock(), tmp_path / MINUTES, 60, stopped=True, begun=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):  # and not that the folder is not there
        run_for(Clock(), tmp_path / "gone" / MINUTES, 60, stopped=True)


def test_a_stage_that_was_stopped_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = dense.Clock(tmp_path, Ranks()), Clock()
    monkeypatch.setattr(dense.time, "monotonic", seconds)

    def stop() -> None:
        seconds.now += 120
        raise KeyboardInterrupt

    def end() -> str:
        seconds.now += 60
        return "done"

    with pytest.raises(KeyboardInterrupt):
        clock.time("stage1", stop)
    assert clock.time("stage1", end) == "done"
    assert clock.minutes == {"stage1": 3.0}
