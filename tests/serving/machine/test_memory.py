"""Memory as counted for a container and for processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from laguna_serve.serving.machine import memory
from laguna_serve.serving.machine.memory import EngineMemory, available_bytes, process_memory, total_bytes

GIB = 1 << 30


def test_this_machine_is_plausible() -> None:
    assert 0 < available_bytes() <= total_bytes() <= psutil.virtual_memory().total


def write_cgroup(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("group", ["/", "/pod/container"], ids=["namespaced", "host-view"])
def test_cgroup_v2_limit_is_found_and_cache_is_free(tmp_path: Path, group: str) -> None:
    files = {
        "memory.max": str(4 * GIB),
        "memory.current": str(3 * GIB),
        "memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    write_cgroup(tmp_path / "cgroup" / group.strip("/"), files)
    membership = tmp_path / "membership"
    membership.write_text(f"0::{group}\n", encoding="utf-8")
    assert memory._read_cgroups(tmp_path / "cgroup", membership) == [(4 * GIB, 2 * GIB)]


def test_cgroup_v1_limit_is_found(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(GIB),
        "memory.usage_in_bytes": "100",
        "memory.stat": "inactive_file 7\ntotal_inactive_file 40\n",
    }
    write_cgroup(tmp_path / "memory" / "box", files)
    membership = tmp_path / "membership"
    membership.write_text("5:devices:/\n4:cpu,memory:/box\n", encoding="utf-8")
    assert memory._read_cgroups(tmp_path, membership) == [(GIB, 60)]


@pytest.mark.parametrize("limit", ["max", str((1 << 63) - 4096)], ids=["v2-max", "huge"])
def test_unlimited_cgroup_is_no_limit(tmp_path: Path, limit: str) -> None:
    write_cgroup(tmp_path / "cgroup", {"memory.max": limit, "memory.current": "1", "memory.stat": ""})
    membership = tmp_path / "membership"
    membership.write_text("0::/\n", encoding="utf-8")
    assert memory._read_cgroups(tmp_path / "cgroup", membership) == []


def test_process_memory_counts_touched_pages() -> None:
    hold = "import sys; block = bytearray(b'x' * (64 << 20)); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        report = process_memory([process.pid, os.getpid()])
        process.stdin.close()
    held = report.processes[0]
    assert held.pid == process.pid
    assert held.peak_rss_bytes >= held.pss_bytes >= 64 << 20
    assert report.pss_bytes == sum(entry.pss_bytes for entry in report.processes)
    assert msgspec.json.decode(msgspec.json.encode(report), type=EngineMemory) == report


def test_process_that_is_gone_is_left_out() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_memory([process.pid]).processes == ()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["VLLM::EngineCore"], "EngineCore"),
        (["python", "-c", "from multiprocessing.resource_tracker import main;main(33)"], "resource_tracker"),
        (["python", "-m", "laguna_serve.plugins.processes.api_server", "--port", "1"], "APIServer"),
        (["sleep", "1"], None),
    ],
)
def test_processes_are_named_by_their_role(command: list[str], name: str | None) -> None:
    assert memory._name_process(command) == name
