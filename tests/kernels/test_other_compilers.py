"""The CPU kernels by other compilers than the machine's usual one, and on an emulated ARM: values and row bits.

Each test is left out where its compiler is not installed: apt install g++-11 clang-14 libomp-14-dev
g++-aarch64-linux-gnu qemu-user has them all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from native_checks import compile_linear, compile_sentinel, run_check

from laguna_serve.kernels import isa

pytestmark = pytest.mark.slow
COMPILERS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}"))
    for name in ("g++-11", "clang++-14")
]
ARM, QEMU = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max")
on_arm = pytest.mark.skipif(not (shutil.which(ARM) and shutil.which(QEMU[0])), reason="needs a compiler and qemu")
X86_PATHS = [path for path, needed in isa.PATHS.items() if path != "neon" and needed <= isa.find_usable()]


@pytest.mark.skipif("avx2" not in isa.read_flags(), reason="needs an x86 processor")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_sentinel_paths(compiler: str, tmp_path: Path) -> None:
    ran = run_check(compile_sentinel(compiler, "x86_64", tmp_path)).split()
    assert ran[-2:] == ["avx2", "portable"]


@pytest.mark.parametrize("path", X86_PATHS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_linear_paths(compiler: str, path: str, tmp_path: Path) -> None:
    run_check(compile_linear(compiler, path, tmp_path))


@on_arm
def test_sentinel_paths_of_an_emulated_arm(tmp_path: Path) -> None:
    ran = run_check(*QEMU, compile_sentinel(ARM, "aarch64", tmp_path, "-static"))
    assert ran.split() == ["neonbf16", "neon", "portable"]


@on_arm
@pytest.mark.parametrize("path", ["neon", "portable"])
def test_linear_paths_of_an_emulated_arm(path: str, tmp_path: Path) -> None:
    run_check(*QEMU, compile_linear(ARM, path, tmp_path, "-static"))
