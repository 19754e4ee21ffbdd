"""The keeper of weights and replicas that fail to order; run in .venv-ray by test_cluster.py."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.serving.cluster import keeper as module
from laguna_serve.serving.cluster.keeper import WeightKeeper, read_versions
from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState, Reply, Version
from laguna_serve.serving.cluster.replica import Replica

NEW = NewWeights(update=[{"folder": "/w/1"}], weight_version="v1")


class FakeReplica:
    """What a replica would do: `fails` has steps, and how often each is refused; `dead` never answers."""

    def __init__(self, name: str, fails: Mapping[str, int] | None = None, *, dead: bool = False) -> None:
        self.name, self.fails, self.dead = name, dict(fails or {}), dead
        self.held, self.weights, self.epoch = False, "default", 0
        self.operations: dict[str, Reply] = {}

    def take(self, method: str, operation: str = "", argument: Any = None) -> Reply | ReplicaState:
        if method == "describe":
            return ReplicaState(self.name, "node", 1, "http://127.0.0.1:1", self.epoch)
        if operation not in self.operations:
            self.operations[operation] = self._take(method, argument)
        return self.operations[operation]

    def _take(self, method: str, argument: Any) -> Reply:
        if self.fails.get(method, 0) > 0:
            self.fails[method] -= 1
            return Reply(self.name, f"{method} refused")
        if method == "hold":
            assert not self.held
            self.held = True
        elif method == "load":
            assert self.held
            self.weights = argument.weight_version
        else:
            self.held, self.epoch = False, argument
        return Reply(self.name)


class FakeHandle:
    """Ray's handle of the replicas that it lists now."""

    def __init__(self, replicas: list[FakeReplica]) -> None:
        self.replicas = replicas

    def broadcast(self, *call: Any) -> FakeHandle:
        self.call = call
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        return [RuntimeError("lost") if one.dead else one.take(*self.call) for one in self.replicas]


def start(folder: Path, *replicas: FakeReplica) -> WeightKeeper:
    keeper = WeightKeeper(str(folder / "weights.json"), {"m": FakeHandle(list(replicas))})  # type: ignore[dict-item]

    async def join() -> None:
        for one in replicas:
            assert await keeper.join("m", one.name, 0)

    asyncio.run(join())
    return keeper


def test_all_have_the_new_weights_and_a_later_keeper_knows_them(tmp_path: Path) -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    report = asyncio.run(start(tmp_path, *replicas).update("m", NEW))
    assert (report.outcome, report.replicas, report.errors) == ("updated", 2, {})
    assert all((one.weights, one.epoch, one.held) == ("v1", 1, False) for one in replicas)
    later = WeightKeeper(str(tmp_path / "weights.json"), {"m": FakeHandle([])})  # type: ignore[dict-item]
    version = asyncio.run(later.find("m"))
    assert (version.epoch, version.weight_version, version.update) == (1, "v1", [{"folder": "/w/1"}])
    assert not asyncio.run(later.join("m", "c", 0))
    assert asyncio.run(later.join("m", "c", 1))


def test_one_that_cannot_load_takes_all_back(tmp_path: Path) -> None:
    replicas = FakeReplica("a"), FakeReplica("b", {"load": 1})
    keeper = start(tmp_path, *replicas)
    report = asyncio.run(keeper.update("m", NEW))
    assert (report.outcome, report.weight_version) == ("rolled_back", "default")
    assert report.errors == {"b": "load refused"}
    assert all((one.weights, one.epoch, one.held) == ("default", 0, False) for one in replicas)
    assert read_versions(tmp_path / "weights.json") == {}
    assert sorted(keeper._members["m"]) == ["a", "b"]


def test_one_that_cannot_be_brought_back_is_struck_off(tmp_path: Path) -> None:
    good, bad = FakeReplica("a"), FakeReplica("b", {"load": 2})
    keeper = start(tmp_path, good, bad)
    report = asyncio.run(keeper.update("m", NEW))
    assert report.outcome == "reduced"
    assert (good.weights, good.epoch, good.held) == ("default", 0, False)
    assert sorted(keeper._members["m"]) == ["a"]
    assert not asyncio.run(keeper.confirm("m", "b", None))  # as a replica that began to load says
    assert not asyncio.run(keeper.confirm("m", "b", bad.epoch))  # as it says once all were told to go on


def test_nothing_is_touched_where_one_cannot_be_held(tmp_path: Path) -> None:
    replicas = FakeReplica("a"), FakeReplica("b", {"hold": 1})
    report = asyncio.run(start(tmp_path, *replicas).update("m", NEW))
    assert (report.outcome, report.errors) == ("unchanged", {"b": "hold refused"})
    assert all((one.weights, one.held) == ("default", False) for one in replicas)


def test_one_that_has_died_keeps_nobody_from_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    good, dead = FakeReplica("a"), FakeReplica("b", dead=True)
    keeper = start(tmp_path, good, dead)
    assert asyncio.run(keeper.update("m", NEW)).outcome == "updated"
    assert good.weights == "v1"
    assert sorted(keeper._members["m"]) == ["a"]
    assert not asyncio.run(keeper.confirm("m", "b", 0))


def test_one_that_dies_in_the_middle_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISSING_S", 0.1)
    good, dying = FakeReplica("a"), FakeReplica("b")
    keeper = start(tmp_path, good, dying)
    take = dying.take

    def die(method: str, *rest: Any) -> Reply | ReplicaState:
        dying.dead = method == "load"
        return take(method, *rest)

    dying.take = die  # type: ignore[method-assign]
    dying.fails = {"load": 1}
    assert asyncio.run(keeper.update("m", NEW)).outcome == "rolled_back"  # its last word is counted
    assert (good.weights, good.held) == ("default", False)
    assert sorted(keeper._members["m"]) == ["a"]


def test_weights_that_nobody_took_are_not_those_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISSING_S", 0.1)
    only = FakeReplica("a")
    keeper = start(tmp_path, only)
    take = only.take

    def die(method: str, *rest: Any) -> Reply | ReplicaState:
        only.dead = method == "hold"
        return take(method, *rest)

    only.take = die  # type: ignore[method-assign]
    report = asyncio.run(keeper.update("m", NEW))
    assert (report.outcome, report.weight_version, list(report.errors)) == ("reduced", "default", ["replicas"])
    assert not asyncio.run(keeper.confirm("m", "a", 0)), "it may have loaded them"
    assert read_versions(tmp_path / "weights.json")["m"] == Version(epoch=1, update=[], draft_update=[])
    assert asyncio.run(keeper.update("m", NEW)).outcome == "unchanged"


def test_one_that_ray_does_not_list_yet_is_waited_for(tmp_path: Path) -> None:
    first, late = FakeReplica("a"), FakeReplica("b")
    keeper = start(tmp_path, first, late)
    handle: Any = keeper._replicas["m"]
    handle.replicas.remove(late)

    async def run() -> str:
        update = asyncio.create_task(keeper.update("m", NEW))
        await asyncio.sleep(0)
        assert not first.held  # requests go on while it is waited for
        handle.replicas.append(late)
        return (await update).outcome

    assert asyncio.run(run()) == "updated"
    assert (late.weights, late.epoch) == ("v1", 1)


def test_one_that_has_left_is_not_waited_for(tmp_path: Path) -> None:
    good, gone = FakeReplica("a"), FakeReplica("b", dead=True)
    keeper = start(tmp_path, good, gone)
    asyncio.run(keeper.leave("m", "b"))
    report = asyncio.run(keeper.update("m", NEW))
    assert (report.outcome, report.replicas) == ("updated", 1)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text('{"schema": "laguna_serve.loss/1"}')
    with pytest.raises(ValueError, match=r"expected laguna_serve\.cluster_weights/1"):
        start(tmp_path)


@pytest.mark.parametrize(("fails", "epoch"), [((), 7), (("v1",), 7), (("v1", "default"), None)])
def test_one_that_could_not_load_has_no_epoch_also_for_a_later_keeper(
    fails: tuple[str, ...], epoch: int | None
) -> None:
    """It is let go on with the others, and a keeper that was started again does not know that it was struck off."""
    replica: Any = Replica.__new__(Replica)
    replica._id, replica._epoch, replica._loaded = "a", 7, True
    replica._operation, replica._outcome, replica._closed = "", None, True

    async def load(new: NewWeights) -> Reply:
        return Reply("a", "refused" if new.weight_version in fails else None)

    async def take(_: object) -> Reply:
        return Reply("a")

    replica._load, replica._take = load, take

    async def run() -> None:
        await replica.hold("1", "keep")
        await replica.load("2", NEW)
        assert replica._epoch is None
        if fails:
            await replica.load("3", NewWeights(update=[{}], weight_version="default"))
        await replica.release("4", 7)
        assert replica._epoch == epoch

    asyncio.run(run())


def test_an_update_of_nothing_is_refused(tmp_path: Path) -> None:
    keeper = start(tmp_path)
    with pytest.raises(ValueError, match="got none"):
        asyncio.run(keeper.update("m", NewWeights()))
    with pytest.raises(ValueError, match="expected one with weight_updates"):
        asyncio.run(keeper.update("n", NEW))
    assert asyncio.run(keeper.find("m")) == Version()
