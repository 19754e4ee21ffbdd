"""What Inductor compiles on a CPU is kept for all configurations, and compiled by threads."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
from warm import run_warm

from laguna_serve.plugins import compiled_kernels

NAME = "c" + "a2z7" * 12 + "abc"
KERNEL = f"{NAME}.main.so"


class Builder:
    """A `CppBuilder` of one target."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def get_target_file_path(self) -> str:
        return str(self.target)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kept" / "this-processor"
    monkeypatch.setattr(compiled_kernels, "kernel_folder", lambda: folder)
    return folder


def compile_into(*targets: Path) -> list[str]:
    """Build each of `targets` in turn; the names of those that were compiled, each with its number as content."""
    compiled: list[str] = []

    def stock(builder: Builder) -> None:
        compiled.append(builder.target.name)
        builder.target.parent.mkdir(parents=True, exist_ok=True)
        builder.target.write_text(str(len(compiled)))

    for target in targets:
        compiled_kernels.wrap_build(stock)(Builder(target))
    return compiled


@pytest.mark.parametrize("name", [KERNEL, f"{NAME}.so"])
def test_second_configuration_takes_what_the_first_compiled(kept: Path, tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "a" / name, tmp_path / "b" / name
    assert compile_into(first, second) == [name]
    assert first.read_text() == second.read_text() == (kept / name).read_text() == "1"
    assert [path.name for path in kept.iterdir()] == [name]


@pytest.mark.parametrize("name", ["header.i", f"{NAME}.h.gch", "kernel.so", f"{NAME}.o", f"x{KERNEL}"])
def test_files_whose_name_does_not_say_what_they_hold_are_compiled_each_time(
    kept: Path, tmp_path: Path, name: str
) -> None:
    assert compile_into(tmp_path / "a" / name, tmp_path / "b" / name) == [name, name]
    assert not kept.exists()


def test_other_file_system_is_copied_to(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert compile_into(tmp_path / "a" / KERNEL, tmp_path / "b" / KERNEL) == [KERNEL]
    assert (kept / KERNEL).read_text() == (tmp_path / "b" / KERNEL).read_text() == "1"


def test_full_disk_keeps_nothing_and_compiles(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:0])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", lambda *_: fill(*_))
    monkeypatch.setattr(compiled_kernels.shutil, "copyfile", fill)
    assert compile_into(tmp_path / "a" / KERNEL, tmp_path / "b" / KERNEL) == [KERNEL, KERNEL]
    assert list(kept.iterdir()) == []


def test_empty_library_is_compiled_again(kept: Path, tmp_path: Path) -> None:
    kept.mkdir(parents=True)
    (kept / KERNEL).write_text("")
    assert compile_into(tmp_path / "a" / KERNEL, tmp_path / "b" / KERNEL) == [KERNEL]
    assert (kept / KERNEL).read_text() == "1"


def test_folder_that_cannot_be_made_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled_kernels, "kernel_folder", lambda: tmp_path / "file" / "folder")
    assert compile_into(tmp_path / "a" / KERNEL, tmp_path / "b" / KERNEL) == [KERNEL, KERNEL]


def test_cores_are_those_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may have bound each thread to a core of its own, and the first of a process with them."""
    mine = os.getpid()
    asked = {0: {3}, mine: {3}}
    fake = types.SimpleNamespace(glob=lambda _: [Path(f"/proc/self/task/{number}") for number in (mine, 7, 8)])

    def tell(thread: int) -> set[int]:
        if thread == 8:
            raise ProcessLookupError
        return set(asked.get(thread, {5}))

    monkeypatch.setattr(compiled_kernels, "Path", lambda path: fake if path == "/proc/self/task" else Path(path))
    monkeypatch.setattr(os, "sched_getaffinity", tell)
    assert compiled_kernels.allowed_cores() == {3, 5}


# Two configurations in one process, and which threads compiled for each.
CODE = """
import os, sys, tempfile, threading
from pathlib import Path
import torch
from torch._inductor import codecache, config, cpp_builder
from laguna_serve.plugins import compiled_kernels
os.sched_getaffinity = lambda _: {0, 1}
os.sched_setaffinity = lambda *_: None
config.cpp.vec_isa_ok = True
stock, compilers = cpp_builder.CppBuilder.build, []
def build(self):
    if self.get_target_file_path().endswith(".main.so"):
        compilers.append(threading.current_thread().name[:7])
    stock(self)
cpp_builder.CppBuilder.build = build
if "kept" in sys.argv:
    compiled_kernels.apply()
    compiled_kernels.apply()
def compute(x):
    return torch.softmax(x, 0).sum() + (x * 3).sum(1)
with tempfile.TemporaryDirectory() as folder:
    os.environ["VLLM_CACHE_ROOT"] = folder
    answers = []
    for number in range(2):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{number}"
        torch._dynamo.reset()
        codecache.CppPythonBindingsCodeCache.cache_clear()
        answers.append(torch.compile(compute)(torch.ones(8, 8)).tolist())
        compilers.append("|")
    print(answers[0] == answers[1], *compilers)
"""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(("kind", "second"), [("stock", True), ("kept", False)])
def test_inductor_compiles_once_and_beside_itself(kind: str, second: bool) -> None:
    """When the stock one does not compile again, Inductor keeps kernels: retire plugins/compiled_kernels.py."""
    done = run_warm(CODE, kind, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    same, *compilers = done.stdout.splitlines()[-1].split()
    assert same == "True"
    first, again = " ".join(compilers).split("|")[:2]
    assert set(first.split()) == {"compile" if kind == "kept" else "MainThr"}
    assert bool(again.split()) is second
