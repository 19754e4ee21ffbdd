"""Steps on a CPU in numbers of rows that come again (row_counts.py), whatever prompts they read.

On a GPU vLLM pads steps to the sizes that its graphs were captured for, and models are written for that: rows behind
the last token write nothing into the KV cache, and what they compute is read by nobody. Here steps are padded
likewise; not those of pooling models, whose sequences a model may find by its rows, nor beside adapters, which vLLM
has mapped to a step's tokens by then.

Checked against vLLM 0.32.0: `_determine_batch_execution_and_padding` of the V1 runner. It can go when
`tests/plugins/test_padded_rows.py::test_stock_pads_no_step` fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from laguna_serve.plugins.cpu_linear import takes_over
from laguna_serve.plugins.repairs.row_counts import pad


def wrap_padding(stock: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`_determine_batch_execution_and_padding` of a runner whose buffers hold `max_num_tokens` rows."""

    @functools.wraps(stock)
    def determine(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        mode, batch, *others = stock(self, *args, **kwargs)
        rows = min(pad(batch.num_tokens), self.max_num_tokens)
        config = self.vllm_config
        alone = config.parallel_config.data_parallel_size == 1  # several ranks agree on theirs
        if rows > batch.num_tokens and alone and config.lora_config is None and not self.is_pooling_model:
            batch = replace(batch, num_tokens=rows)
        return (mode, batch, *others)

    return determine


def apply() -> None:
    """Pad the steps of the V1 runner, unless our own product multiplies, which needs no making."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = GPUModelRunner._determine_batch_execution_and_padding
    if not hasattr(stock, "__wrapped__") and not takes_over():
        GPUModelRunner._determine_batch_execution_and_padding = wrap_padding(stock)
