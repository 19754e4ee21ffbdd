"""Replicas that are to prove that they have the same weights; run in .venv-ray by test_cluster.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from keeper_cases import FakeHandle, FakeReplica, start

from laguna_serve.serving.cluster import keeper as module
from laguna_serve.serving.cluster.keeper import OtherWeightsError, WeightKeeper, read_versions
from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState, Reply, Told
from laguna_serve.serving.cluster.replica import read_digests
from laguna_serve.serving.cluster.versions_file import MOST_STRUCK, read_struck, write_versions
from laguna_serve.serving.gateway.engines.digests import Digests
from laguna_serve.serving.kit.files import WriteError

NEW = NewWeights(update=[{"folder": "/w/1"}], weight_version="v1", digests=True)
MUTE = "HTTP 502: /collective_rpc: teacher: HTTP 500: "


class TellingReplica(FakeReplica):
    """One that shows digests: of `spoils`, by version, each part is another than it should be."""

    def __init__(
        self, name: str, spoils: dict[str, str] | None = None, *, engine: str = "e", mute: bool = False
    ) -> None:
        super().__init__(name)
        self.spoils, self.engine, self.mute = spoils or {}, engine, mute
        self.told: Told | None = None

    def tell(self) -> Told:
        if self.mute:
            return Told(self.engine, fault=MUTE)
        spoiled = self.spoils.get(self.weights, "")
        parts = {part: f"{self.weights}{self.name if part in spoiled else ''}" for part in ("model", "draft")}
        return Told(self.engine, [Digests(**parts)])

    def take(self, method: str, operation: str = "", argument: Any = None) -> Reply | ReplicaState:
        found = super().take(method, operation, argument)
        asked = isinstance(found, ReplicaState) and self.told is not None
        return replace(found, told=self.told) if asked else found

    def _take(self, method: str, argument: Any) -> Reply:
        reply = super()._take(method, argument)
        asked = method == "load" and argument.digests and reply.error is None
        self.told = self.tell() if asked else None if method == "load" else self.told
        return replace(reply, told=self.told if method == "load" else None)


def update(keeper: WeightKeeper, new: NewWeights = NEW) -> tuple[str, dict[str, str]]:
    report = asyncio.run(keeper.update("m", new))
    return report.outcome, dict(report.errors)


def join_later(keeper: WeightKeeper, one: TellingReplica) -> bool:
    """Join as a replica that started on the weights of now."""
    one.weights = asyncio.run(keeper.find("m")).weight_version
    return asyncio.run(keeper.join("m", one.name, 1, one.tell()))


def test_equal_ones_have_the_new_weights_and_a_later_keeper_asks_too(tmp_path: Path) -> None:
    assert update(start(tmp_path, TellingReplica("a"), TellingReplica("b"))) == ("updated", {})
    assert read_versions(tmp_path / "weights.json")["m"].digests


@pytest.mark.parametrize(
    ("part", "words"), [("model", "the model"), ("draft", "the drafter"), ("model draft", "the model and the drafter")]
)
def test_one_that_differs_takes_all_back(tmp_path: Path, part: str, words: str) -> None:
    replicas = TellingReplica("a", {"v1": part}), TellingReplica("b"), TellingReplica("c")
    keeper = start(tmp_path, *replicas)
    line = f"digests: expected the weights of b, got others: {words}"
    assert update(keeper) == ("rolled_back", {"a": line})
    assert all((one.weights, one.epoch, one.held) == ("default", 0, False) for one in replicas)
    assert sorted(keeper._members["m"]) == ["a", "b", "c"]
    assert read_versions(tmp_path / "weights.json") == {}


def test_nobody_is_compared_unless_it_is_asked_for(tmp_path: Path) -> None:
    replicas = TellingReplica("a", {"v1": "model"}), TellingReplica("b")
    assert update(start(tmp_path, *replicas), replace(NEW, digests=False)) == ("updated", {})


def test_one_that_still_differs_after_the_way_back_is_replaced(tmp_path: Path) -> None:
    bad = TellingReplica("a", {"v1": "model", "default": "model"})
    keeper = start(tmp_path, bad, TellingReplica("b"), TellingReplica("c"))
    assert update(keeper)[0] == "reduced"
    assert sorted(keeper._members["m"]) == ["b", "c"]
    assert not asyncio.run(keeper.confirm("m", "a", bad.epoch)), "it was let go on, but its weights are others"


def test_two_that_differ_after_the_way_back_are_both_replaced(tmp_path: Path) -> None:
    """Which of them is right is not known."""
    keeper = start(tmp_path, TellingReplica("a", {"v1": "model", "default": "model"}), TellingReplica("b"))
    outcome, errors = update(keeper)
    assert (outcome, errors["a"]) == ("reduced", f"digests: {module.DOUBT}")
    assert sorted(keeper._members["m"]) == []


def test_one_that_is_struck_off_stays_so_for_a_later_keeper(tmp_path: Path) -> None:
    """It has the epoch of all others, and only its digests tell it from them."""
    bad, good = TellingReplica("a", {"v1": "model", "default": "model"}), TellingReplica("b")
    assert update(start(tmp_path, bad, good, TellingReplica("c")))[0] == "reduced"
    assert bad.epoch == good.epoch == 0
    handle: Any = FakeHandle([bad, good])
    later = WeightKeeper(str(tmp_path / "weights.json"), {"m": handle})
    assert not asyncio.run(later.confirm("m", "a", 0, bad.told))
    assert asyncio.run(later.confirm("m", "b", 0, good.told))
    asyncio.run(later._hear("m"))
    assert sorted(later._members["m"]) == ["b"]
    assert asyncio.run(later.update("m", replace(NEW, weight_version="v2"))).outcome == "updated"
    last = WeightKeeper(str(tmp_path / "weights.json"), {"m": FakeHandle([])})  # type: ignore[dict-item]
    assert not asyncio.run(last.confirm("m", "a", 1, bad.told)), "a later version does not make it well"


def test_those_struck_off_are_kept_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    write_versions(file, {}, [f"r{number}" for number in range(MOST_STRUCK + 2)])
    assert read_struck(file)[:: MOST_STRUCK - 1] == ["r2", f"r{MOST_STRUCK + 1}"]


def test_file_of_before_names_nobody(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text('{"schema": "laguna_serve.cluster_weights/1", "models": {"m": {"epoch": 3}}}')
    assert (read_struck(file), read_versions(file)["m"].epoch) == ([], 3)


def test_full_disk_does_not_keep_a_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WriteError("weights.json: expected room, got none")

    bad = TellingReplica("a", {"v1": "model", "default": "model"})
    keeper = start(tmp_path, bad, TellingReplica("b"), TellingReplica("c"))
    monkeypatch.setattr(module, "write_versions", fail)
    assert update(keeper)[0] == "reduced"
    assert not asyncio.run(keeper.confirm("m", "a", bad.epoch))
    assert not bad.held


def test_full_disk_takes_all_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a keeper that is started again would not know of is not served; and nobody stays on hold."""

    def fail(*_: object) -> None:
        raise WriteError("weights.json: expected room, got none")

    replicas = TellingReplica("a"), TellingReplica("b")
    keeper = start(tmp_path, *replicas)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_versions", fail)
        assert update(keeper) == ("rolled_back", {"weights.file": "weights.json: expected room, got none"})
    assert all((one.weights, one.epoch, one.held) == ("default", 0, False) for one in replicas)
    assert asyncio.run(keeper.confirm("m", "a", 0, replicas[0].told))
    assert asyncio.run(keeper.find("m")).weight_version == "default"
    assert update(keeper) == ("updated", {})


def test_one_that_cannot_tell_is_named_and_the_update_counts(tmp_path: Path) -> None:
    replicas = TellingReplica("a", mute=True), TellingReplica("b")
    keeper = start(tmp_path, *replicas)
    assert update(keeper) == ("updated", {"a": f"digests: not compared, as it cannot tell: {MUTE}"})
    assert all((one.weights, one.epoch) == ("v1", 1) for one in replicas)
    assert join_later(keeper, TellingReplica("c", mute=True))


def test_one_that_dies_while_it_is_asked_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISSING_S", 0.1)
    dying = TellingReplica("b")
    keeper = start(tmp_path, TellingReplica("a"), dying, TellingReplica("c"))
    handle: Any = keeper._replicas["m"]
    ask = handle.results_async

    async def hear(**options: Any) -> list[Any]:
        dying.dead = dying.dead or handle.call[0] == "load"
        return await ask(**options)

    handle.results_async = hear
    assert update(keeper) == ("updated", {})
    assert sorted(keeper._members["m"]) == ["a", "c"]


def test_a_new_one_that_differs_does_not_join(tmp_path: Path) -> None:
    keeper = start(tmp_path, TellingReplica("a"), TellingReplica("b"))
    assert update(keeper) == ("updated", {})
    assert join_later(keeper, TellingReplica("c"))
    with pytest.raises(OtherWeightsError, match=r"^replica d: digests: expected the weights of a, got others: the dr"):
        join_later(keeper, TellingReplica("d", {"v1": "draft"}))
    assert sorted(keeper._members["m"]) == ["a", "b", "c"]


def test_engines_that_were_started_otherwise_are_not_compared(tmp_path: Path) -> None:
    """As those of a configuration that has changed: Ray starts them while the others still serve."""
    keeper = start(tmp_path, TellingReplica("a"), TellingReplica("b"))
    assert update(keeper) == ("updated", {})
    assert join_later(keeper, TellingReplica("c", {"v1": "model"}, engine="other"))


def test_a_keeper_that_was_started_again_hears_what_the_replicas_have(tmp_path: Path) -> None:
    old = TellingReplica("a")
    assert update(start(tmp_path, old)) == ("updated", {})
    later = WeightKeeper(str(tmp_path / "weights.json"), {"m": FakeHandle([])})  # type: ignore[dict-item]
    assert asyncio.run(later.confirm("m", "a", 1, old.tell()))
    with pytest.raises(OtherWeightsError, match="the model"):
        join_later(later, TellingReplica("b", {"v1": "model"}))


def test_a_keeper_that_was_started_again_asks_before_a_new_one_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked it yet whether he may go on, and Ray's list of replicas comes a moment after its start."""
    serving = TellingReplica("a"), TellingReplica("b")
    assert update(start(tmp_path, *serving)) == ("updated", {})
    outdated = TellingReplica("0", {"default": "model"})  # which never took the version of now
    handle: Any = FakeHandle([])
    later = WeightKeeper(str(tmp_path / "weights.json"), {"m": handle})
    wait = asyncio.sleep

    async def list_them(seconds: float) -> None:
        handle.replicas = [*serving, outdated]
        await wait(0)

    monkeypatch.setattr(module.asyncio, "sleep", list_them)
    with pytest.raises(
        OtherWeightsError, match=r"^replica c: digests: expected the weights of a, got others: the model"
    ):
        join_later(later, TellingReplica("c", {"v1": "model"}))
    assert join_later(later, TellingReplica("d"))
    assert sorted(later._members["m"]) == ["a", "b", "d"]


def test_the_first_of_all_has_nobody_to_be_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED_S", 0.1)
    assert update(start(tmp_path, TellingReplica("a"))) == ("updated", {})
    later = WeightKeeper(str(tmp_path / "weights.json"), {"m": FakeHandle([])})  # type: ignore[dict-item]
    assert join_later(later, TellingReplica("b"))


def test_what_a_replicas_gateway_shows_is_read() -> None:
    assert read_digests("e", '{"m": [{"model": "1", "draft": null}]}') == Told("e", [Digests("1", None)])
    for body in ("no JSON", "{}", '{"m": [{"draft": "1"}]}', '{"m": [], "n": []}'):
        found = read_digests("e", body)
        assert found.ranks == ()
        assert str(found.fault).startswith("expected the digests of one engine, got '")
