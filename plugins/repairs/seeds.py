"""Requests with a `seed` whose prompt does not fit into one step.

A step that computes a part of a prompt samples a token for it and drops it, and vLLM turns the request's generator
back by what that took: `set_offset`, which a CPU's generator does not have ("CPU Generator does not use offset"). One
request with a long prompt, or with several prompts, ends the engine. Here a dropped token is drawn without the
request's generator, which has then nothing to turn back: a seed gives the same tokens wherever its prompt was cut.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_repairs.py::test_stock_runner_turns_a_generator_back` fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

stock_sample = GPUModelRunner._sample
stock_bookkeeping = GPUModelRunner._bookkeeping_sync


@contextmanager
def unfinished_prompts_unseeded(runner: GPUModelRunner) -> Iterator[None]:
    """Take the generators of requests whose token will be dropped out of the batch, for a while."""
    generators = runner.input_batch.generators
    dropped = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    held = {int(row): generators.pop(int(row)) for row in dropped if int(row) in generators}
    try:
        yield
    finally:
        generators.update(held)


def sample(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
    """`GPUModelRunner._sample`; the sampling metadata holds the batch's own dictionary of generators."""
    with unfinished_prompts_unseeded(self):
        return stock_sample(self, *args, **kwargs)


def bookkeeping(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
    """`GPUModelRunner._bookkeeping_sync`, which finds no generator to turn back."""
    with unfinished_prompts_unseeded(self):
        return stock_bookkeeping(self, *args, **kwargs)


def apply() -> None:
    """Put `sample` and `bookkeeping` in the place of the runner's `_sample` and `_bookkeeping_sync`."""
    GPUModelRunner._sample = sample
    GPUModelRunner._bookkeeping_sync = bookkeeping
