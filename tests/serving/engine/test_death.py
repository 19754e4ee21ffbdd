"""The kernel's count of processes that it killed for memory, from whichever of its files can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.engine import death

V2 = "low 0\nhigh 3\noom 4\noom_kill 2\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
MACHINE = "nr_free_pages 1\noom_kill 9\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"v2/memory.events": V2, "v1/memory.oom_control": V1, "vmstat": MACHINE}, 2),
        ({"v1/memory.oom_control": V1, "vmstat": MACHINE}, 5),
        ({"vmstat": MACHINE}, 9),
        ({"vmstat": "nr_free_pages 1\n"}, 0),
        ({}, 0),
    ],
    ids=["group-v2", "group-v1", "machine", "old-kernel", "nothing"],
)
def test_the_closest_counter_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    groups = [tmp_path / "v2" / death.V2, tmp_path / "v1" / death.V1]
    monkeypatch.setattr(death, "_list_group_files", lambda: iter(groups))
    monkeypatch.setattr(death, "MACHINE", str(tmp_path / "vmstat"))
    assert death.count_memory_kills() == expected


def test_this_machines_counters_are_read() -> None:
    assert death.count_memory_kills() >= 0
    assert all(path.name in (death.V1, death.V2) for path in death._list_group_files())
