"""Compiling on a CPU: what an earlier start compiled is loaded, and no garbage ends the engine meanwhile.

On a CPU vLLM compiles by Inductor without its own backend, so that what it stores is a plain function; loading asks
that function for `finalize_loading`, which only the backend's object has, and compiles again: half a minute of every
start on two cores, where loading takes two seconds. Here a plain function counts as loaded.

What is stored holds vectorised C++ of one instruction set, which vLLM's name for it leaves out: here it is a part of
the name, as a home folder may be shared by unlike processors and `ATEN_CPU_CAPABILITY` set for one start.

Matrices prepared for oneDNN give their memory back when they are collected, by two operations of torch: in the midst of
tracing these are recorded instead of run, fail, and print the tensor by more of them, until the stack ends. It happens
to the output layer of a drafter that takes the target's, if the collector comes by while the model is compiled. Here
they run whatever is being traced.

Checked against vLLM 0.32.0. The halves can go when `test_stock_loader_wants_more_than_a_function` and
`test_stock_handle_is_not_released_while_tracing` of tests/plugins/test_repairs.py fail.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.compilation import caching

from laguna_serve.kernels.isa import uses_own_experts
from laguna_serve.plugins import compiled_kernels
from laguna_serve.plugins.cpu_linear import takes_over

stock_load = torch.compiler.load_compiled_function
stock_factors = caching.aot_compile_hash_factors


def load(*args: Any, **kwargs: Any) -> Any:
    """`torch.compiler.load_compiled_function`, whose plain functions have nothing left to do."""
    loaded: Any = stock_load(*args, **kwargs)
    compiled = loaded._artifacts.compiled_fn
    if not hasattr(compiled, "finalize_loading"):
        compiled.finalize_loading = lambda _config: None
    return loaded


def list_factors(*args: Any) -> list[str]:
    """`caching.aot_compile_hash_factors`, the processor's instruction sets as far as they may be used, and our kernels.

    A stored model multiplies with what it was compiled for, whatever a layer would choose now.
    """
    isa = sorted(torch.cpu.get_capabilities().items())
    ours = f"laguna_serve::linear: {takes_over()}, whole experts: {uses_own_experts()}"
    return [*stock_factors(*args), str(isa), str(os.environ.get("ATEN_CPU_CAPABILITY")), ours]


def release(handler: CPUDNNLGEMMHandler) -> None:
    """`CPUDNNLGEMMHandler.__del__`, outside whatever is being traced; a process that ends gives everything back."""
    if handler.handler_tensor is not None and not sys.is_finalizing():
        with no_python_dispatcher(), _disable_current_modes():
            handler.dtor(handler.handler_tensor.item())


def apply() -> None:
    """Put `load`, `list_factors` and `release` in the place of torch's and vLLM's."""
    CPUDNNLGEMMHandler.__del__ = release
    torch.compiler.load_compiled_function = load
    caching.aot_compile_hash_factors = list_factors
    compiled_kernels.apply()
