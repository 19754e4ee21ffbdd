"""The op on a CPU: cpu.cpp, built once per machine by the C++ compiler that torch.compile needs there too.

Without a compiler plain torch does the work, several times slower; a warning says so once.  The library is kept in the
user's cache folder, under a name that changes with the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
# Strict floating point: a row's bits may not depend on how the compiler regroups a sum.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, BAD_EXPERT, NO_MEMORY = 0, 1, 2
COMPILE_LIMIT_S = 300


class BuildError(RuntimeError):
    """cpu.cpp could not be built or loaded, as one line."""


def run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
) -> torch.Tensor:
    """The op for checked, contiguous CPU tensors (shapes as in launch.py); fp32, fp16 or bf16.

    Deterministic, and a row's bits do not depend on the other rows or on the number of threads, when cpu.cpp runs.

    Raises:
        IndexError: an expert id is out of range.
        MemoryError: no room for the activations of 4096 tokens.
    """
    library = load_library()
    if library is None:
        return run_torch(x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start)
    out = torch.empty_like(x)
    (T, H), k, E, B = x.shape, topk_ids.shape[1], block_start.numel() - 1, w2_blocks.shape[1]
    tensors = (x, topk_weights, topk_ids, w13_blocks, w2_blocks, block_start, out)
    pointers = [tensor.data_ptr() for tensor in tensors]
    status = library(DTYPES[x.dtype], T, H, k, E, B, *pointers, torch.get_num_threads())
    if status == BAD_EXPERT:
        raise IndexError(f"topk_ids: expected expert ids from 0 to {E - 1}, got {_range(topk_ids)}; check the router")
    if status == NO_MEMORY:
        raise MemoryError(f"sentinel_moe: expected room for the activations of {T} tokens, got none; free some memory")
    assert status == OK
    return out


def run_torch(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
) -> torch.Tensor:
    """`run` with torch's matrix products in fp32, expert by expert: where there is no compiler."""
    H = x.shape[1]
    start = block_start.tolist()
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < len(start) - 1:
            limit = f"expert ids from 0 to {len(start) - 2}"
            raise IndexError(f"topk_ids: expected {limit}, got {_range(topk_ids)}; check the router")
        chosen = topk_ids == expert
        rows = chosen.any(dim=1).nonzero().squeeze(1)
        weights = (topk_weights * chosen).sum(dim=1)[rows, None]
        blocks = slice(start[expert], start[expert + 1])
        gate, up = (w13_blocks[blocks, part].reshape(-1, H).float() for part in (0, 1))
        inputs = x[rows].float()
        hidden = F.silu(inputs @ gate.t()) * (inputs @ up.t()) * weights
        out[rows] += hidden.to(x.dtype).float() @ w2_blocks[blocks].reshape(-1, H).float()
    return out.to(x.dtype)


@functools.cache
def load_library() -> Callable[..., int] | None:
    """The compiled entry point, or None (with a warning) where it cannot be had."""
    try:
        function = ctypes.CDLL(str(build())).sentinel_moe
    except (BuildError, OSError) as error:
        logger.warning("sentinel_moe on a CPU: using plain torch, several times slower: %s", error)
        return None
    function.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 7, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def build() -> Path:
    """Compile cpu.cpp unless the cache has it.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("expected a C++ compiler, found none; install g++ or name one in CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join((SOURCE.read_text(encoding="utf-8"), compiler, version, *FLAGS, _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laguna-serve" / "kernels"
    library = folder / f"sentinel_moe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler}: expected an end within {COMPILE_LIMIT_S} s, got none") from None
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise BuildError(f"{compiler}: expected to compile cpu.cpp, got {first.strip()}")
        made.replace(library)
    return library


def _processor() -> str:
    """What -march=native looks at, as a shared home folder may serve unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _range(ids: torch.Tensor) -> str:
    return f"{int(ids.min())} to {int(ids.max())}"
