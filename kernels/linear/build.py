"""Builds cpu.cpp once per machine and path, with the C++ compiler that torch.compile needs on a CPU too.

The library is kept in the user's cache folder, under a name that changes with the source, the compiler and the path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
from collections.abc import Callable
from pathlib import Path

from laguna_serve.kernels.linear.isa import choose_path
from laguna_serve.kernels.toolchain import BuildError, find_compiler, keep_library, run_compiler

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
# Strict floating point, fused where the source says so: a row's bits may not depend on how a compiler regroups a sum.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi")
PATH_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "neon": (),
    "portable": ("-DPORTABLE",),
}


@functools.cache
def load_library() -> Callable[..., int] | None:
    """Load the compiled entry point for this machine's path, or None (with a warning) where it cannot be had.

    Raises:
        IsaError: LAGUNA_CPU_ISA names a path that cannot run here.
    """
    path = choose_path()
    try:
        return open_library(build(path))
    except (BuildError, OSError) as error:
        logger.warning("linear layers in bfloat16: using torch's, several times slower here: %s", error)
        return None


def open_library(library: Path) -> Callable[..., int]:
    """Open the entry point of a built library.

    Raises:
        OSError: it cannot be loaded.
    """
    function = ctypes.CDLL(str(library)).linear_bf16
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [size, size, size, pointer, size, pointer, size, pointer, pointer, ctypes.c_int]
    function.restype = ctypes.c_int
    entry: Callable[..., int] = function
    return entry


def build(path: str) -> Path:
    """Compile cpu.cpp for a path unless the cache has it.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *PATH_FLAGS[path])
    parts = (SOURCE.read_text(encoding="utf-8"), *compiler.command, compiler.version, *flags, platform.machine())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def compile_to(made: Path) -> None:
        run_compiler([*compiler.command, *flags, "-o", str(made), str(SOURCE)], SOURCE.name)

    return keep_library(f"linear-{path}-{key}.so", compile_to)
