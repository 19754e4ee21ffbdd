"""Builds native/ into one library for all processors of an architecture, once, in the user's cache.

Every instruction set has a file of its own, compiled with its own flags; which one runs is decided when the library is
loaded (cpu.py). A set that the compiler does not know is left out. g++ from 11 and clang++ from 14 will do. The
library uses torch's stable interface, so that a newer torch does not need another, and a wheel for one platform can
carry it beside the sources (scripts/wheel.sh).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from laguna_serve.kernels.toolchain import BuildError, Compiler, find_compiler, keep_library, run_compiler

SOURCES = Path(__file__).with_name("native")
SHARED = Path(__file__).parents[1] / "native"
# Strict floating point: a row's bits may not depend on how the compiler regroups or contracts a sum.
STRICT = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*STRICT, "-fPIC", "-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000")
AVX512 = ("-mavx512f", "-mavx512bw", "-mfma", "-mf16c")
AVX512_BF16 = (*AVX512, "-mavx512vl", "-mavx512bf16")
VBMI = (*AVX512_BF16, "-mavx512vbmi")
# Files that any processor runs, and by architecture those that it must have the instructions for.
COMMON = ("driver", "op", "pairs", "paths")
# For a processor that has nothing better, more of the compiler's time is not worth it.
PORTABLE = {"path_portable": ("-O2",)}
PATHS = {
    "x86_64": {
        "path_avx2": ("-mavx2", "-mfma", "-mf16c"),
        "path_avx512": AVX512,
        "path_avx512bf16": AVX512_BF16,
        "path_avx512vbmi": VBMI,
        "path_amx": (*VBMI, "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"path_neon": (), "path_neonbf16": ("-march=armv8.2-a+bf16",)},
}


def build() -> Path:
    """Build the library unless the cache has it; processes that want it at once wait for the first.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    compiler = find_compiler()
    return keep_library(f"sentinel_moe-{make_key(compiler)}.so", lambda made: compile_library(compiler, made))


def find_prebuilt() -> Path | None:
    """Find the library of these very sources that came with a wheel for this architecture."""
    library = SOURCES / name_prebuilt()
    return library if library.exists() else None


def name_prebuilt() -> str:
    """Name a library for this architecture as it is called beside its sources."""
    key = hashlib.sha256("\0".join([*_read_sources(), repr(PATHS)]).encode()).hexdigest()[:16]
    return f"sentinel_moe-{platform.machine()}-{key}.so"


def _read_sources() -> list[str]:
    files = (*sorted(SOURCES.iterdir()), *sorted(SHARED.iterdir()))
    paths = (path for path in files if path.suffix in (".cpp", ".hpp"))
    return [path.read_text(encoding="utf-8") for path in paths]


def make_key(compiler: Compiler) -> str:
    """Make a name that changes with all that the library is made of."""
    parts = [
        *_read_sources(),
        *compiler.command,
        compiler.version,
        *FLAGS,
        repr(PATHS),
        platform.machine(),
        torch.__version__,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compile_library(compiler: Compiler, library: Path) -> Path:
    """Compile every file, as many at once as there are processors, and link them.

    Raises:
        BuildError: a file that any processor needs does not compile, or they do not link.
    """
    own = PATHS.get(platform.machine(), {})
    # The longest first.
    units: dict[str, tuple[str, ...]] = {**own, **PORTABLE, **dict.fromkeys(COMMON, ())}
    torch_folder = Path(torch.__file__).parent

    def compile_unit(name: str) -> Path | None:
        unit = library.with_name(f"{name}.o")
        include = ("-isystem", str(torch_folder / "include"))
        command = [*compiler.command, *FLAGS, *units[name], *include, "-c", str(SOURCES / f"{name}.cpp")]
        try:
            run_compiler([*command, "-o", str(unit)], f"{name}.cpp")
        except BuildError:
            if name in own:
                return None
            raise
        return unit

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [str(unit) for unit in pool.map(compile_unit, units) if unit is not None]
    link = ("-L", str(torch_folder / "lib"), "-ltorch_cpu")
    run_compiler([*compiler.command, "-shared", "-o", str(library), *made, *link], "the library")
    return library


def make_prebuilt(folder: Path) -> Path:
    """Compile the library for a wheel into `folder`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    target = folder / name_prebuilt()
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(compile_library(find_compiler(), Path(scratch) / target.name), target)
    return target
