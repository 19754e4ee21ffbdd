"""Builds native/ once per machine and path, with the C++ compiler that torch.compile needs on a CPU too.

Two libraries are kept in the user's cache folder, under names that change with the source, the compiler and the path:
the product, for one instruction set, and the op that hands torch's tensors to it without Python in between.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from laguna_serve.kernels.isa import TILES, choose_path
from laguna_serve.kernels.toolchain import BuildError, keep_compiled

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("native")
TILES_HEADER = Path(__file__).parents[1] / "native" / "amx.hpp"
# Strict floating point, fused where the source says so: a row's bits may not depend on how a compiler regroups a sum.
SHARED = ("-std=c++17", "-fPIC", "-shared")
FLAGS = ("-O3", *SHARED, "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi")
OP_FLAGS = ("-O1", *SHARED, "-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma")
PATH_FLAGS = {
    "amx": (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "avx512": AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
    "neon": (),
    "portable": ("-DPORTABLE",),
}


@functools.cache
def load_library() -> Callable[..., int] | None:
    """Load the product for this machine's path, from now on behind the op; None, with a warning, if it cannot be had.

    Raises:
        IsaError: LAGUNA_CPU_ISA names a path that cannot run here.
    """
    path = choose_path()
    try:
        product = open_library(build(path))
    except (BuildError, OSError) as error:
        logger.warning("linear layers in bfloat16: using vLLM's, slower here: %s", error)
        return None
    try:
        _register(product)
    except (BuildError, OSError) as error:
        logger.warning("linear layers in bfloat16: some 20 µs slower a call, through Python: %s", error)
    return product


def _register(product: Any) -> None:
    """Make torch call the product for the op, from the next call on, without Python in between.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the library cannot be kept or loaded.
    """
    op = build_op()
    torch.ops.load_library(str(op))
    use = ctypes.CDLL(str(op)).linear_use
    use.argtypes, use.restype = [ctypes.c_void_p], None
    use(ctypes.cast(product, ctypes.c_void_p))


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
    """Compile the product for a path, which of AMX is a file of its own, unless the cache has it.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    headers = (TILES_HEADER,) if path == TILES else ()
    return keep_compiled(f"linear-{path}", find_source(path), (*FLAGS, *PATH_FLAGS[path]), headers=headers)


def find_source(path: str) -> Path:
    """Find what a path is compiled from."""
    return SOURCES / ("tiles.cpp" if path == TILES else "product.cpp")


def build_op() -> Path:
    """Compile op.cpp against this torch unless the cache has it.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    folder = Path(torch.__file__).parent
    torch_flags = ("-isystem", str(folder / "include"), "-L", str(folder / "lib"))
    return keep_compiled("linear-op", SOURCES / "op.cpp", (*OP_FLAGS, *torch_flags), "-ltorch_cpu")
