"""Building the CPU library: once, under a lock, in a folder of the user's own; and which path is taken."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from moe_cases import ROUTING_SHAPE, TOLERANCE, make_inputs, relative_error
from native_checks import compile_program, run_check

from laguna_serve.kernels.sentinel_moe import build as building
from laguna_serve.kernels.sentinel_moe import cpu, sentinel_moe_reference
from laguna_serve.kernels.toolchain import BuildError

# A compiler that writes what it was asked for at once, and counts how often.
FAKE = """#!/bin/sh
case "$*" in *--version*) echo fake 1; exit;; esac
echo run >> "$(dirname "$0")/runs"
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes nothing, in CXX, and an empty cache folder."""
    compiler = tmp_path / "compiler"
    compiler.write_text(FAKE)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def count_runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


@pytest.mark.slow
def test_library_is_built_once(fake_compiler: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: building.build(), range(4)))
    once = count_runs(fake_compiler)
    assert len(made) == 1
    assert building.build() in made
    assert count_runs(fake_compiler) == once
    units = len(building.COMMON) + len(building.PATHS.get(os.uname().machine, {})) + 1
    assert once == units + 1, "each file, the portable path among them, and the library"


def test_compiler_may_stand_behind_a_cache_of_its_own(fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {fake_compiler / 'compiler'}")
    assert building.build().read_text() == "made\n"


@pytest.mark.parametrize("named", ["no-such-compiler", "env no-such-compiler"])
def test_missing_compiler_is_named(named: str, fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=rf"expected a C\+\+ compiler, got CXX='{named}'; install g\+\+"):
        building.build()


def test_failing_compiler_is_reported_and_leaves_nothing(fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_compiler / "compiler").write_text("#!/bin/sh\necho 'x.cpp:1: error: no' >&2\nexit 1\n")
    with pytest.raises(BuildError, match=r"compiler: expected to make \w+\.cpp, got x\.cpp:1: error: no"):
        building.build()
    assert not list(fake_compiler.rglob("*.so"))


def test_instructions_that_the_compiler_does_not_know_are_left_out(
    fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = FAKE.replace("echo run", 'case "$*" in *avx512bf16*) echo error: what >&2; exit 1;; esac\necho run')
    (fake_compiler / "compiler").write_text(refusing)
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    assert building.build().exists()


@pytest.mark.parametrize("folder", ["/proc/no/such", "/dev/null"])
def test_unwritable_cache_is_replaced_by_a_temporary_folder(
    folder: str, fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    library = building.build()
    assert library.exists()
    assert library.parent.stat().st_mode & 0o077 == 0
    assert building.build() == library


def test_temporary_folder_goes_with_its_process_and_with_no_fork_of_it() -> None:
    code = """
import os, sys
from laguna_serve.kernels.toolchain import find_cache
folder = find_cache()
if os.fork() == 0:
    sys.exit()
os.wait()
print(folder, folder.is_dir())
"""
    environment = os.environ | {"XDG_CACHE_HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, there = done.stdout.split()
    assert there == "True"
    assert not Path(folder).exists()


def test_folder_that_anyone_can_write_is_not_trusted(fake_compiler: Path) -> None:
    trusted = building.build()
    trusted.parent.chmod(0o777)
    assert building.build().parent != trusted.parent
    trusted.parent.chmod(0o755)
    assert building.build() == trusted
    trusted.chmod(0o666)
    trusted.write_text("someone else's")
    assert building.build().read_text() == "made\n"


def test_a_wheels_library_needs_no_compiler(fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_compiler / "native"
    shutil.copytree(building.SOURCES, folder)
    monkeypatch.setattr(building, "SOURCES", folder)
    assert building.find_prebuilt() is None
    library = folder / building.name_prebuilt()
    library.write_text("made elsewhere\n")
    assert building.find_prebuilt() == library
    with (folder / "driver.cpp").open("a") as source:
        source.write("// changed\n")
    assert building.find_prebuilt() is None, "a library of other sources was taken"


@pytest.mark.slow
def test_a_wheels_library_that_does_not_load_is_built_instead() -> None:
    source = """
from pathlib import Path
from laguna_serve.kernels.sentinel_moe import cpu
cpu.find_prebuilt = lambda: Path("/dev/null")
print(cpu.load() is not None)
"""
    done = run_python(source)
    assert done.stdout == "True\n", done.stderr


def run_python(source: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_path_is_named_by_a_variable() -> None:
    source = "from laguna_serve.kernels.sentinel_moe import cpu; print(cpu.describe())"
    done = run_python(source, LAGUNA_CPU_ISA="portable")
    assert done.stdout == "portable\n", done.stderr


@pytest.mark.parametrize(("name", "needs"), [("mmx", ""), ("neon", "")])
def test_path_that_cannot_run_is_refused(name: str, needs: str) -> None:
    kernels = cpu.load()
    assert kernels is not None
    if any(path.name == name and path.supported for path in kernels.paths):
        pytest.skip("this processor has it")
    before = kernels.use_path(None)
    with pytest.raises(cpu.PathError, match=rf"^LAGUNA_CPU_ISA: expected one of .*portable on this .*, got {name}"):
        kernels.use_path(name)
    assert kernels.use_path(None) == before


@pytest.mark.parametrize(
    ("flags", "asked", "path"),
    [
        ({"GenuineIntel", "avx512_bf16"}, None, "avx512"),
        ({"GenuineIntel", "avx512_bf16"}, "avx512bf16", "avx512bf16"),
        ({"GenuineIntel", "avx512_bf16", "amx_bf16"}, None, None),
        ({"AuthenticAMD", "avx512_bf16"}, None, None),
    ],
)
def test_bf16_arithmetic_that_is_slow_is_left_out(
    flags: set[str], asked: str | None, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = cpu.load()
    assert kernels is not None
    monkeypatch.setattr(cpu, "find_usable", lambda: flags)
    monkeypatch.setattr(kernels, "paths", [cpu.CpuPath(name, "", True) for name in ("avx512bf16", "avx512", "avx2")])
    monkeypatch.delenv("LAGUNA_CPU_ISA", raising=False)
    if asked is not None:
        monkeypatch.setenv("LAGUNA_CPU_ISA", asked)
    assert kernels.choose_path() == path
    monkeypatch.setattr(kernels, "paths", [cpu.CpuPath("avx2", "", True)])
    assert kernels.choose_path() == asked


@pytest.mark.slow
def test_without_a_compiler_torch_does_the_work() -> None:
    source = """
import logging, torch
from laguna_serve.kernels.sentinel_moe import sentinel_moe, sentinel_moe_reference
logging.basicConfig()
torch.manual_seed(0)
inputs = (torch.randn(3, 16), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int32), torch.randn(1, 2, 16, 16),
          torch.randn(1, 16, 16), torch.tensor([0, 1], dtype=torch.int32))
for _ in range(2):
    torch.testing.assert_close(sentinel_moe(*inputs), sentinel_moe_reference(*inputs))
"""
    done = run_python(source, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("using plain torch, several times slower: expected a C++ compiler") == 1


def has_avx512bf16() -> bool:
    kernels = cpu.load()
    return kernels is not None and any(path.name == "avx512bf16" and path.supported for path in kernels.paths)


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512bf16(), reason="what is around the tiles needs AVX512-BF16")
def test_tiles_of_an_emulated_amx(tmp_path: Path) -> None:
    """The AMX path with its tiles in plain C++: results, row bits, and no tile that is read before it is written."""
    check, compiler = Path(__file__).with_name("native_check.cpp"), shutil.which("g++") or "c++"
    names = ("path_amx", "path_avx512", "path_portable", "paths", "driver", "pairs")
    flags = building.PATHS["x86_64"]
    emulated = ("-DEMULATE_AMX", f"-I{check.parent}")
    commands: list[tuple[Path, tuple[str, ...]]] = [
        (
            building.SOURCES / f"{name}.cpp",
            (*building.STRICT, "-O2", *flags.get(name, ()), *(emulated if name == "path_amx" else ())),
        )
        for name in names
    ]
    commands.append((check, (*building.STRICT, "-O2", f"-I{building.SOURCES}")))
    assert run_check(compile_program(compiler, commands, tmp_path), "amx").split() == ["amx"]


def test_plain_torch_computes_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for dtype, tolerance in TOLERANCE.items():
            inputs = make_inputs(5, *ROUTING_SHAPE, 2, dtype)
            assert relative_error(cpu.run_torch(*inputs), sentinel_moe_reference(*inputs)) < tolerance
    assert torch.is_tensor(inputs.x)
