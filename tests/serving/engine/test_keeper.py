"""When an engine is started again and when it is given up, on a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from laguna_serve.serving.engine import Engine, EngineError
from laguna_serve.serving.engine.keeper import Keeper, RestartPolicy

POLICY = RestartPolicy(first_s=1.0, max_s=60.0, quick_s=300.0, max_quick=5)


@dataclass
class World:
    """Engines that start, or fail to where `failing` says so (by number, from 1), in a time that passes by itself."""

    log: Path
    failing: set[int] = field(default_factory=set)
    now: float = 0.0
    slept: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    started: int = 0
    running: int = 0

    def make(self) -> Engine:
        return cast(Engine, FakeEngine(self))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def keeper(self, policy: RestartPolicy = POLICY) -> Keeper:
        return Keeper(self.make, policy, self.told.append, clock=lambda: self.now, sleep=self.sleep)


class FakeEngine:
    def __init__(self, world: World) -> None:
        self.world, self.log_path, self.up = world, world.log, False

    def __enter__(self) -> FakeEngine:
        self.world.started += 1
        if self.world.started in self.world.failing:
            raise EngineError(f"start {self.world.started} failed")
        self.world.log.write_text(f"start {self.world.started}")
        self.world.running, self.up = self.world.running + 1, True
        self.world.now += 20.0
        return self

    def stop(self) -> None:
        self.world.running -= self.up
        self.up = False


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "serve.log")


def die(world: World, keeper: Keeper, after_s: float, cause: str = "it died") -> None:
    world.now += after_s
    keeper.note_death(EngineError(cause))
    assert keeper.away
    assert world.running == 0
    keeper.revive()
    assert not keeper.away
    assert world.running == 1


def test_quick_deaths_are_waited_for_longer_and_longer_and_then_given_up(world: World) -> None:
    with world.keeper() as keeper:
        for _ in range(4):
            die(world, keeper, after_s=10)
        assert world.slept == [1, 2, 4, 8]
        with pytest.raises(EngineError, match=r"^it died; given up after 5 failures in a row, each within 300 s of "):
            die(world, keeper, after_s=10)
        assert (keeper.restarts, world.started, world.running) == (4, 5, 0)


def test_an_engine_that_served_long_is_sound(world: World) -> None:
    with world.keeper() as keeper:
        for _ in range(3):
            die(world, keeper, after_s=10)
        for _ in range(20):
            die(world, keeper, after_s=300)
        assert world.slept[3:] == [1] * 20
        assert keeper.restarts == 23


def test_waits_have_a_limit(world: World) -> None:
    with world.keeper(RestartPolicy(max_quick=12)) as keeper:
        for _ in range(10):
            die(world, keeper, after_s=0)
    assert world.slept == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_starts_that_fail_count_and_are_told(world: World) -> None:
    world.failing = {2, 3}
    with world.keeper() as keeper:
        die(world, keeper, after_s=1000, cause="killed")
        assert world.slept == [1, 2, 4]
        assert keeper.restarts == 1
        assert world.told == [
            "killed; starting it again in 1 s (failure 1 of 5 in a row)",
            "start 2 failed; starting it again in 2 s (failure 2 of 5 in a row)",
            "start 3 failed; starting it again in 4 s (failure 3 of 5 in a row)",
        ]
        assert [(death.cause, death.served_s) for death in keeper.deaths] == [
            ("killed", 1000),
            ("start 2 failed", None),
            ("start 3 failed", None),
        ]


def test_starts_that_always_fail_are_given_up(world: World) -> None:
    world.failing = set(range(2, 100))
    with world.keeper() as keeper, pytest.raises(EngineError, match="start 5 failed; given up after 5 failures"):
        die(world, keeper, after_s=1000)
    assert world.started == 5


def test_what_never_worked_is_not_tried_again(world: World) -> None:
    world.failing = {1}
    with pytest.raises(EngineError, match=r"^start 1 failed$"), world.keeper():
        pass
    assert (world.started, world.slept) == (1, [])


def test_an_interrupt_at_any_time_leaves_nothing(world: World) -> None:
    """While it waits to start it again."""

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    keeper = Keeper(world.make, POLICY, world.told.append, clock=lambda: world.now, sleep=interrupt)

    def serve() -> None:
        with keeper:
            keeper.note_death(EngineError("it died"))
            keeper.revive()

    with pytest.raises(KeyboardInterrupt):
        serve()
    assert world.running == 0
    assert world.started == 1


def test_earlier_logs_are_kept(world: World) -> None:
    world.log.write_text("of an earlier command")
    with world.keeper() as keeper:
        for _ in range(6):
            die(world, keeper, after_s=300)
    names = sorted(path.name for path in world.log.parent.iterdir())
    assert names == ["serve.log", *(f"serve.log.{number}" for number in range(1, 6))]
    assert world.log.read_text() == "start 7"
    assert [world.log.with_name(f"serve.log.{n}").read_text() for n in (1, 5)] == ["start 6", "start 2"]


def test_only_the_last_deaths_are_remembered(world: World) -> None:
    with world.keeper() as keeper:
        for number in range(30):
            die(world, keeper, after_s=300, cause=f"death {number}")
        assert keeper.restarts == 30
        assert [death.cause for death in keeper.deaths] == [f"death {number}" for number in range(10, 30)]
