"""Linear layers in bfloat16 on CPUs: ours on every x86 processor, and on ARM without bfloat16.

Without bf16 arithmetic (x86 with AVX2 or plain AVX-512, ARM without bf16) oneDNN refuses bf16 products (AVX2), and vLLM
falls back to torch's, eight rows in about the time of eight times one row; or it emulates them (AVX-512), eight rows in
the time of three or four. Intel's without AMX multiply bf16 at half the rate of float32 (kernels/isa.py). AMD's have
it at full rate, and Intel's with AMX tiles, but with few rows oneDNN reads memory at half to three quarters of its
bandwidth. Everywhere an output's bits depend on the number of rows. `kernels/linear` reads each weight once for all
rows, and sums every output alike. vLLM's linear layers and its output layer ask one function how to multiply on a CPU,
and this wraps it: layers with other dtypes, and all layers of other processors, are left to vLLM.

Checked against vLLM 0.32.0. It can go when `tests/plugins/test_cpu_linear.py::test_stock_falls_back_to_torch` fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from laguna_serve.kernels.linear import choose_path, linear, load_library, uses_linear_op

logger = init_logger("vllm.laguna_serve.cpu_linear")

Dispatch = Callable[..., None]


def accelerate_linear() -> None:
    """Make linear layers loaded from now on use the op, where it is wanted and can be built; again changes nothing.

    The op is looked for when the first layer is loaded, in the process that computes.
    """
    if not uses_linear_op():
        return
    from vllm.model_executor.layers import utils

    stock: Dispatch | None = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if stock is not None and not hasattr(stock, "__wrapped__"):
        utils.dispatch_cpu_unquantized_gemm = wrap_dispatch(stock)


@functools.cache
def takes_over() -> bool:
    """Whether bf16 products of this process belong to the op: it is wanted and was built."""
    return uses_linear_op() and load_library() is not None


def takes(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Say whether the op multiplies by a layer's weight: a matrix in bfloat16 whose rows lie in memory one by one."""
    rows = weight.dim() == 2 and (weight.stride(1) == 1 or weight.shape[1] <= 1)
    return rows and weight.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)


def wrap_dispatch(stock: Dispatch) -> Dispatch:
    """`dispatch_cpu_unquantized_gemm` that gives bf16 matrices our product and leaves the others to `stock`."""

    @functools.wraps(stock)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight: torch.Tensor = layer.weight
        if weight.is_meta or not takes(weight, getattr(layer, "bias", None)) or load_library() is None:
            stock(layer, remove_weight)
            return
        layer.cpu_linear = linear
        logger.info_once("Linear layers in bfloat16: laguna_serve::linear (%s)", choose_path())

    return dispatch
