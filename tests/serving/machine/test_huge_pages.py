"""Huge pages are asked for where Linux and glibc have them, and an engine's large memory then lies in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laguna_serve.serving.machine import huge_pages
from laguna_serve.serving.machine.huge_pages import describe_huge_pages, plan_huge_pages, read_glibc, read_policy

OURS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HELD = """
import torch
kept = [torch.ones(1 << 20, dtype=torch.bfloat16) for _ in range(16)]
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose policy is in the file, with a glibc that has the variable."""
    policy = tmp_path / "enabled"
    policy.write_text("always [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "FOLDER", tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda _name: 4096)
    monkeypatch.setattr(huge_pages, "read_glibc", lambda: (2, 35))
    return policy


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("base", "planned"),
    [
        ({}, OURS),
        ({"GLIBC_TUNABLES": ""}, OURS),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.check=1"},
            {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"},
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2:glibc.malloc.check=1"}, {}),
    ],
)
def test_callers_choice_stands(base: dict[str, str], planned: dict[str, str]) -> None:
    assert plan_huge_pages(base) == planned


@pytest.mark.parametrize(
    ("policy", "planned", "described"),
    [
        ("[always] madvise never", OURS, "2 MiB where they fit"),
        ("always [madvise] never", OURS, "2 MiB where they fit"),
        ("always madvise [never]", {}, "4 KiB: {file} says never"),
        ("what?", {}, "4 KiB"),
        (None, {}, "4 KiB"),
    ],
)
def test_what_linux_gives(policy: str | None, planned: dict[str, str], described: str, machine: Path) -> None:
    if policy is None:
        machine.unlink()
    else:
        machine.write_text(policy)
    assert plan_huge_pages({}) == planned
    assert describe_huge_pages(plan_huge_pages({})).startswith(described.format(file=machine))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("version", [(), (2, 34), (2, 9)])
def test_a_library_without_the_variable(version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "read_glibc", lambda: version)
    assert plan_huge_pages({}) == {}
    assert describe_huge_pages({}) == "4 KiB: glibc 2.35 or later would ask for huge ones"


def test_pages_of_half_a_gibibyte_are_not_asked_for(machine: Path) -> None:
    machine.with_name("hpage_pmd_size").write_text(str(512 << 20))
    assert plan_huge_pages({}) == {}
    assert describe_huge_pages({}) == "4 KiB"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("environment", "described"),
    [
        (OURS | {"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}, "as the allocator in LD_PRELOAD asks for them"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"}, "as GLIBC_TUNABLES says"),
    ],
)
def test_what_another_asks_for(environment: dict[str, str], described: str) -> None:
    assert describe_huge_pages(environment) == described


def test_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda _name: None)
    assert read_glibc() == ()


@pytest.mark.slow
@pytest.mark.skipif(read_policy() != "madvise" or not plan_huge_pages({}), reason="this machine gives none to who asks")
def test_tensors_lie_in_them() -> None:
    held = [
        int(subprocess.check_output([sys.executable, "-c", HELD], env=os.environ | asked, text=True))
        for asked in ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, OURS)
    ]
    assert held[0] == 0
    assert held[1] >= 16 << 10  # KiB: half of the tensors' 32 MiB at least
