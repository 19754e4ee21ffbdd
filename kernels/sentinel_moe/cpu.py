"""The op on a CPU: the library of native/, and which of its paths runs.

The best path for the processor is taken, or the one that LAGUNA_CPU_ISA names. Once loaded, the library
answers for CPU tensors without Python in between. Without a compiler plain torch does the work, several times slower;
a warning says so once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from laguna_serve.kernels.isa import VARIABLE, find_usable, has_slow_bf16
from laguna_serve.kernels.sentinel_moe.build import build, find_prebuilt
from laguna_serve.kernels.sentinel_moe.reference import dequantise
from laguna_serve.kernels.toolchain import BuildError

logger = logging.getLogger(__name__)


class PathError(ValueError):
    """A path was asked for that this build or this processor has not, as one line."""


@dataclass(frozen=True, slots=True)
class CpuPath:
    """A path of the library: `needs` of the processor, and whether it has them."""

    name: str
    needs: str
    supported: bool


class Kernels:
    """The loaded library, whose paths are tried by name."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.sentinel_use_path.argtypes = [ctypes.c_char_p]
        library.sentinel_use_path.restype = library.sentinel_list_paths.restype = ctypes.c_char_p
        self._use_path = library.sentinel_use_path
        lines = [line.split("\t") for line in library.sentinel_list_paths().decode().splitlines()]
        self.paths = [CpuPath(name, needs, supported == "1") for name, needs, supported in lines]

    def use_path(self, name: str | None) -> str:
        """Take this path from the next call on, None for the best; its name.

        Raises:
            PathError: there is none of this name, or the processor lacks what it needs.
        """
        taken: bytes | None = self._use_path(None if name is None else name.encode())
        if taken is None:
            able = ", ".join(path.name for path in self.paths if path.supported)
            needs = next((f", which needs {path.needs}" for path in self.paths if path.name == name), "")
            raise PathError(f"{VARIABLE}: expected one of {able} on this processor, got {name}{needs}; unset it")
        return taken.decode()

    def choose_path(self) -> str | None:
        """Choose the path: LAGUNA_CPU_ISA's, or the one without bf16 arithmetic where that is slow; None: the best."""
        plain = any(path.name == "avx512" and path.supported for path in self.paths)
        return os.environ.get(VARIABLE) or ("avx512" if plain and has_slow_bf16(find_usable()) else None)


@functools.cache
def load() -> Kernels | None:
    """Load the library, from now on behind the op for CPU tensors; None, with a warning, where it cannot be had.

    Raises:
        PathError: LAGUNA_CPU_ISA names a path that cannot run here.
    """
    library = _load_prebuilt()
    try:
        if library is None:
            library = build()
            torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        logger.warning("sentinel_moe on a CPU: using plain torch, several times slower: %s", error)
        return None
    kernels = Kernels(ctypes.CDLL(str(library)))
    kernels.use_path(kernels.choose_path())
    return kernels


def _load_prebuilt() -> Path | None:
    """Load what came with the wheel, unless this system's libraries are too old for it."""
    library = find_prebuilt()
    if library is None:
        return None
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        logger.info("sentinel_moe on a CPU: building it, as the wheel's library does not load: %s", error)
        return None
    return library


def describe() -> str:
    """Describe what runs the op on this machine's CPU; builds it where that was not done yet.

    Raises:
        PathError: LAGUNA_CPU_ISA names a path that cannot run here.
    """
    kernels = load()
    if kernels is None:
        return "plain torch, several times slower: no C++ compiler made the kernels"
    return kernels.use_path(kernels.choose_path())


def run_torch(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_blocks: torch.Tensor,
    w2_blocks: torch.Tensor,
    block_start: torch.Tensor,
    w13_scales: torch.Tensor | None = None,
    w2_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the op for checked tensors by torch's matrix products in fp32, expert by expert.

    Raises:
        IndexError: an expert id, or a chosen expert's entry of block_start, is out of range.
    """
    H, n = x.shape[1], len(w2_blocks)
    start = block_start.tolist()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if expert == -1:
            continue
        if not 0 <= expert < len(start) - 1:
            limit = f"expert ids from 0 to {len(start) - 2}, or -1 for none"
            raise IndexError(f"topk_ids: expected {limit}, got {expert}; check the router")
        if not 0 <= start[expert] <= start[expert + 1] <= n:
            got = f"{start[expert]} to {start[expert + 1]}"
            raise IndexError(f"block_start: expected ascending numbers up to {n}, got {got}; check the checkpoint")
        chosen = topk_ids == expert
        rows = chosen.any(dim=1).nonzero().squeeze(1)
        weights = (topk_weights * chosen).sum(dim=1)[rows, None]
        blocks = slice(start[expert], start[expert + 1])
        gate, up = dequantise(w13_blocks, w13_scales, blocks).transpose(0, 1).reshape(2, -1, H)
        down = dequantise(w2_blocks, w2_scales, blocks).reshape(-1, H)
        inputs = x[rows].float()
        hidden = F.silu(inputs @ gate.t()) * (inputs @ up.t()) * weights
        out[rows] += hidden.to(x.dtype).float() @ down
    return out.to(x.dtype)
