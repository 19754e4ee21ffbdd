"""Builds cpu.cpp once per machine and path, with the C++ compiler that torch.compile needs on a CPU too.

The library is kept in the user's cache folder, under a name that changes with the source, the compiler and the path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from laguna_serve.kernels.linear.isa import choose_path

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
COMPILE_LIMIT_S = 300


class BuildError(RuntimeError):
    """cpu.cpp could not be built or loaded, as one line."""


@functools.cache
def load_library() -> Callable[..., int] | None:
    """The compiled entry point for this machine's path, or None (with a warning) where it cannot be had.

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
    """The entry point of a built library.

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
        OSError: the cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("expected a C++ compiler, found none; install g++ or name one in CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    flags = (*FLAGS, *PATH_FLAGS[path])
    key = "\n".join((SOURCE.read_text(encoding="utf-8"), compiler, version, *flags, platform.machine()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laguna-serve" / "kernels"
    library = folder / f"linear-{path}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *flags, "-o", str(made), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler}: expected an end within {COMPILE_LIMIT_S} s, got none") from None
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise BuildError(f"{compiler}: expected to compile cpu.cpp, got {first.strip()}")
        made.replace(library)
    return library
