"""Compiled models of an earlier start, which a CPU's engine stores and then cannot load.

On a CPU vLLM compiles by Inductor without its own backend, so that what it stores is a plain function; loading asks
that function for `finalize_loading`, which only the backend's object has, and compiles again: half a minute of every
start on two cores, where loading takes two seconds.  Here a plain function counts as loaded.

What is stored holds vectorised C++ of one instruction set, which vLLM's name for it leaves out: here it is a part of
the name, as a home folder may be shared by unlike processors and `ATEN_CPU_CAPABILITY` set for one start.

Checked against vLLM 0.32.0.  It can go when
`tests/plugins/test_repairs.py::test_stock_loader_wants_more_than_a_function` fails.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.compilation import caching

stock_load = torch.compiler.load_compiled_function
stock_factors = caching.aot_compile_hash_factors


def load(*args: Any, **kwargs: Any) -> Any:
    """`torch.compiler.load_compiled_function`, whose plain functions have nothing left to do."""
    loaded = stock_load(*args, **kwargs)
    compiled = loaded._artifacts.compiled_fn
    if not hasattr(compiled, "finalize_loading"):
        compiled.finalize_loading = lambda _config: None
    return loaded


def list_factors(*args: Any) -> list[str]:
    """`caching.aot_compile_hash_factors` and the processor's instruction sets, as far as they may be used."""
    isa = sorted(torch.cpu.get_capabilities().items())
    return [*stock_factors(*args), str(isa), str(os.environ.get("ATEN_CPU_CAPABILITY"))]


def apply() -> None:
    """Put `load` and `list_factors` in the place of torch's and vLLM's."""
    torch.compiler.load_compiled_function = load
    caching.aot_compile_hash_factors = list_factors
