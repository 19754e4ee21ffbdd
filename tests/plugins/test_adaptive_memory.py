"""What a policy has learned survives its engine: the next one decides as if it had gone on."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
from adaptive_simulation import WIDTH, Simulation

from laguna_serve.plugins.adaptive.memory import KEPT_EVERY_S, VARIABLE, MemoryFile, PolicyMemory, open_memory
from laguna_serve.plugins.adaptive.policy import Policy

PAYS, DOES_NOT = [0.85] * WIDTH, [0.3, *[0.1] * (WIDTH - 1)]


def restart(policy: Policy, path: Path) -> Policy:
    """Keep what it has learned in a file, and begin anew with that."""
    MemoryFile(path).write(policy.dump(), 0.0)
    known = MemoryFile(path).read(policy.width)
    assert known is not None
    again = Policy(policy.width)
    again.load(known)
    assert again.dump() == known
    return again


@pytest.mark.parametrize("chances", [PAYS, DOES_NOT], ids=["pays", "does not"])
@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_a_policy_that_begins_with_it_loses_nothing_to_learning(
    chances: list[float], concurrency: int, tmp_path: Path
) -> None:
    def simulate(seed: int) -> Simulation:
        return Simulation(lambda _step, _number: chances, concurrency, seed=seed)

    learned = Policy(WIDTH)
    simulate(1).run(3000, learned)
    again = restart(learned, tmp_path / "learned.json")
    _, best = simulate(2).best(300)
    reached = simulate(2).run(300, again)
    assert reached > 0.97 * best
    assert reached > 0.99 * simulate(2).run(300, Policy(WIDTH))


def test_what_was_learned_wrongly_is_corrected(tmp_path: Path) -> None:
    """The same file, and drafts that are accepted no more; then they are again."""
    policy = Policy(WIDTH)
    for chances in (PAYS, DOES_NOT, PAYS):
        simulation = Simulation(lambda _step, _number, chances=chances: chances, 4)  # type: ignore[misc]
        simulation.run(3000, policy)
        drafting = sum(width > 0 for width in simulation.widths[-500:]) / 500
        assert drafting > 0.85 if chances is PAYS else drafting < 0.15
        policy = restart(policy, tmp_path / "learned.json")


def test_nothing_and_what_cannot_be_read_is_learned_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "learned.json"
    assert MemoryFile(path).read(WIDTH) is None
    assert not caplog.records
    MemoryFile(path).write(Policy(3).dump(), 0.0)
    whole = path.read_bytes()
    memory = msgspec.json.decode(whole, type=PolicyMemory)
    assert MemoryFile(path).read(3) == memory
    bad = [whole[:-20], b"", b"[]", whole.replace(b'"pace":0', b'"pace":1e9'), whole.replace(b"/1", b"/2")]
    for content in bad:
        path.write_bytes(content)
        assert MemoryFile(path).read(3) is None, content
    path.write_bytes(whole)
    assert MemoryFile(path).read(7) is None  # drafts of another width
    assert len(caplog.records) == len(bad) + 1
    assert all(record.levelno == logging.WARNING and "anew" in record.message for record in caplog.records)


def test_a_disk_that_refuses_costs_what_was_learned_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    MemoryFile(tmp_path / "file" / "learned.json").write(Policy(3).dump(), 0.0)
    assert "not kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_is_written_now_and_then(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path / "learned.json")
    assert [memory.is_due(now) for now in (5.0, 6.0, 4.0 + KEPT_EVERY_S, 5.0 + KEPT_EVERY_S)] == [
        False,
        False,
        False,
        True,
    ]
    memory.write(Policy(3).dump(), 100.0)
    assert not memory.is_due(101.0)


def test_the_launcher_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert open_memory() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "learned.json"))
    assert isinstance(open_memory(), MemoryFile)
