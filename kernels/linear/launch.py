"""The public op: checks its arguments and hands them to the library, as one node of a compiled graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from laguna_serve.kernels.linear.build import load_library

OK, NO_MEMORY, NO_TILES = 0, 1, 2


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias in bfloat16 on a CPU: products summed in fp32, rounded once; nothing is packed beforehand.

    The weights are read from memory once for all rows of a batch. A row's bits depend neither on the other rows nor
    on the number of threads.

    Args:
        x: [..., K] bf16.
        weight: [N, K] bf16, rows contiguous.
        bias: [N] bf16, contiguous.

    Returns:
        [..., N] bf16.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or stride is not as above.
        MemoryError: no room for a copy of some rows of x.
    """
    _check(x, weight, bias)
    out: torch.Tensor = torch.ops.laguna_serve.linear.default(x, weight, bias)
    return out


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Define the op: everything widened, multiplied by torch in fp32, rounded once."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def run_with(
    library: Callable[..., int], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threads: int
) -> torch.Tensor:
    """Run a library of one path on checked tensors."""
    N, K = weight.shape
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), K)
    if rows.stride(1) != 1 and K > 1:
        rows = rows.contiguous()
    M = rows.shape[0]
    out = x.new_empty((M, N))
    bias_pointer = None if bias is None else bias.data_ptr()
    status = library(
        M, N, K, rows.data_ptr(), rows.stride(0), weight.data_ptr(), weight.stride(0), bias_pointer, out.data_ptr(),
        threads,
    )  # fmt: skip
    if status == NO_MEMORY:
        raise MemoryError(f"linear: expected room for some of {M} rows of {K}, got none; free some memory")
    require_tiles(status)
    assert status == OK
    return out if x.dim() == 2 else out.view(*x.shape[:-1], N)


def require_tiles(status: int) -> None:
    """Raise RuntimeError where the product says that Linux gave this process no tiles of AMX."""
    if status == NO_TILES:
        raise RuntimeError(
            "linear: expected Linux to give this process AMX's tiles, got none; set LAGUNA_CPU_ISA=avx512"
        )


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    bf16 = torch.bfloat16
    if x.dtype != bf16 or weight.dtype != bf16 or (bias is not None and bias.dtype != bf16):
        got = ", ".join(str(tensor.dtype) for tensor in (x, weight, bias) if tensor is not None)
        raise TypeError(f"linear: expected x, weight and bias in bfloat16, got {got}; convert them")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"linear: expected x [..., K] and weight [N, K], got {got}")
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(f"weight: expected contiguous rows, got strides {weight.stride()}; make it contiguous")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        got = f"{list(bias.shape)} with strides {bias.stride()}"
        raise ValueError(f"bias: expected [{weight.shape[0]}], contiguous, got {got}")


def run_from_python(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Run it where no library has registered itself: before it is loaded, or for good if op.cpp cannot be built."""
    library = load_library()
    if library is None:
        return F.linear(x, weight, bias)
    return run_with(library, x, weight, bias, torch.get_num_threads())


def _run_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library = torch.library.Library("laguna_serve", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear", run_from_python, "CompositeExplicitAutograd")
torch.library.register_fake("laguna_serve::linear", _run_fake, lib=_library)
