"""Cores are those that a container's quota is worth, in both versions of cgroups and wherever it is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from laguna_serve.serving.machine.cores import count_cores

V1 = "3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/a.slice/b\n", {"cpu.max": "max 100000\n", "a.slice/cpu.max": "800000 100000\n"}, 8),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "800000 100000\n", "a.slice/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/../elsewhere\n", {"cpu.max": "300000 100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "600000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "500000", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/\n", {"cpu.max": "nonsense"}, 64),
        ("0::/\n", {}, 64),
        (None, {"cpu.max": "400000 100000\n"}, 64),
    ],
)
def test_quota_bounds_the_cores(
    membership: str | None,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert count_cores(tmp_path / "root", tmp_path / "membership") == expected


def test_this_machine_has_some() -> None:
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))
