"""The timer of a client's connection, on a loop with a controlled clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from laguna_serve.serving.gateway.clients.timer import LazyTimer


class Loop:
    """As much of an event loop as a timer needs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.handles: list[tuple[float, Callable[[], None], _Handle]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, act: Callable[[], None]) -> Any:
        handle = _Handle()
        self.handles.append((when, act, handle))
        return handle

    def run_until(self, now: float) -> None:
        while due := [entry for entry in self.handles if entry[0] <= now and not entry[2].cancelled]:
            entry = min(due, key=lambda entry: entry[0])
            self.handles.remove(entry)
            self.now = max(self.now, entry[0])
            entry[1]()
        self.now = now


class _Handle:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def made() -> tuple[Loop, LazyTimer, list[float]]:
    loop, acted = Loop(), list[float]()
    return loop, LazyTimer(loop, lambda: acted.append(loop.now)), acted  # type: ignore[arg-type]


def test_acts_when_the_time_last_given_is_over(made: tuple[Loop, LazyTimer, list[float]]) -> None:
    loop, timer, acted = made
    timer.start(10)
    loop.run_until(9)
    timer.start(10)
    loop.run_until(18)
    assert acted == []
    loop.run_until(100)
    assert acted == [19]


def test_earlier_time_is_not_missed(made: tuple[Loop, LazyTimer, list[float]]) -> None:
    loop, timer, acted = made
    timer.start(75)
    timer.start(5)
    loop.run_until(100)
    assert acted == [5]


def test_requests_in_a_row_set_one_timer(made: tuple[Loop, LazyTimer, list[float]]) -> None:
    loop, timer, _ = made
    for _ in range(100):
        timer.start(75)
        timer.stop()
        loop.run_until(loop.now + 0.1)
    assert len(loop.handles) == 1


@pytest.mark.parametrize("end", ["stop", "close"])
def test_nothing_comes_after_the_end(end: str, made: tuple[Loop, LazyTimer, list[float]]) -> None:
    loop, timer, acted = made
    timer.start(5)
    getattr(timer, end)()
    loop.run_until(100)
    assert (acted, loop.handles if end == "stop" else []) == ([], [])
