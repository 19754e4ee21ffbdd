"""`logprob_token_ids` beside other requests' `logprobs`, and beside a drafter.

vLLM gives the log-probabilities of the tokens that a request names (`logprob_token_ids`) in the place of the likeliest
ones of *every* request of the step: a neighbour's `logprobs: 5` gets the wrong number of columns, filled with token 0
at minus infinity. With a drafter they are missing altogether, and the front end ends in "list index out of range".
Here each request's row holds what that request asked for.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_repairs.py::test_stock_logprob_token_ids_replace_the_neighbours` fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

stock_forward = Sampler.forward


def gather(
    logprobs: torch.Tensor, tokens: torch.Tensor, count: int | None, named: dict[int, list[int]]
) -> LogprobsTensors:
    """Gather the sampled token's log-probability in column 0, then the row's named tokens or the `count` likeliest.

    Args:
        logprobs: [rows, vocabulary] float32.
        tokens: [rows] int64, sampled.
        count: most columns that a row without named tokens wants; None for none.
        named: row → token ids, in the order asked for.

    Returns:
        Token ids and log-probabilities [rows, 1 + widest row]; columns that a row does not use hold the token 0 at
        minus infinity, or likelier tokens than asked for, and are cut off by the front end.
    """
    wanted = count or 0
    gathered = Sampler.gather_logprobs(logprobs, wanted, tokens)
    extra = max(0, max(map(len, named.values()), default=0) - wanted)
    ids = torch.nn.functional.pad(gathered.logprob_token_ids, (0, extra))
    values = torch.nn.functional.pad(gathered.logprobs, (0, extra), value=float("-inf"))
    for row, row_ids in named.items():
        columns = torch.tensor(row_ids, dtype=torch.int64, device=logprobs.device)
        ids[row, 1 : 1 + len(row_ids)] = columns.to(ids.dtype)
        values[row, 1 : 1 + len(row_ids)] = logprobs[row, columns]
    return LogprobsTensors(ids, values, gathered.selected_token_ranks)


def forward(self: Sampler, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> Any:
    """`Sampler.forward`; in a step where a request names tokens, all log-probabilities are taken and then gathered."""
    named = sampling_metadata.logprob_token_ids
    if not named:
        return stock_forward(self, logits, sampling_metadata, *args, **kwargs)
    everything = replace(sampling_metadata, logprob_token_ids=None, max_num_logprobs=-1)
    output: SamplerOutput = stock_forward(self, logits, everything, *args, **kwargs)
    tokens = output.sampled_token_ids.flatten().long()
    assert output.logprobs_tensors is not None
    output.logprobs_tensors = gather(
        output.logprobs_tensors.logprobs, tokens, sampling_metadata.max_num_logprobs, named
    )
    return output


def apply() -> None:
    """Put `forward` in the place of vLLM's `Sampler.forward`."""
    Sampler.forward = forward
