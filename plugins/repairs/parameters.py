"""Weights on which every operation is asked of Python first, to no effect.

vLLM's parameters have a `__torch_function__` of their own that calls their parent's, which does nothing. Its presence
is enough for torch to leave C++ for Python and come back at every operation on a weight, compiled or not: some 10 µs
each, of which a small model's step on a CPU has fifty. Here the parent's is put in its place, as torch's own
parameters have it, and torch does not ask.

Checked against vLLM 0.32.0 with torch 2.13.0. It can go when
`tests/plugins/test_repairs.py::test_stock_weights_ask_python` fails.
"""

from __future__ import annotations

import torch
from vllm.model_executor.parameter import BasevLLMParameter


def apply() -> None:
    """Give vLLM's parameters the `__torch_function__` of torch's."""
    BasevLLMParameter.__torch_function__ = torch.nn.Parameter.__torch_function__
