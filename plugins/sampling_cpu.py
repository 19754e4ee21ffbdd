"""Mends what vLLM's CPU build does to sampled requests that are drafted for.

To verify drafts, temperature, top-k and top-p are handed from every request to each of its drafted positions by
`expand_kernel` (vLLM's v1/sample/rejection_sampler.py).  Its stand-in on a CPU (`_expand_kernel_impl` in
utils/cpu_triton_utils.py) writes into an int64 copy of the output and drops it, unless the output is int64 itself:
logits are then divided by uninitialised memory.  Greedy requests are spared only while they are among themselves.
bench/sampling.py found it: on the toy pair the likeliest second token came in 41% of the completions instead of 20%.

The stand-in is replaced through vLLM's own registry of kernels.  Checked against vLLM 0.32.0.  It can go when
`tests/plugins/test_sampling_cpu.py::test_stock_kernel_writes_nothing` fails.
"""

from __future__ import annotations

import torch

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand_kernel(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write each request's value to its tokens.  Names are those of the Triton kernel, by which it is called.

    Args:
        output_ptr: [num_tokens], written.
        input_ptr: [batch], of the same dtype; values equal to `replace_from` become `replace_to`.
        cu_num_tokens_ptr: [batch] integers, the number of tokens up to and including each request.
        MAX_NUM_TOKENS: the Triton kernel's block; nothing to a CPU.
    """
    counts = torch.diff(cu_num_tokens_ptr, prepend=cu_num_tokens_ptr.new_zeros(1))
    values = input_ptr.masked_fill(input_ptr == replace_from, replace_to)
    output_ptr.copy_(values.repeat_interleave(counts))


def mend_sampling() -> None:
    """Put our kernel in the place of vLLM's stand-in, in this process; where Triton itself runs there is none."""
    from vllm.triton_utils import dispatcher
    from vllm.v1.sample import rejection_sampler

    current = rejection_sampler.expand_kernel
    if isinstance(current, dispatcher.KernelOverride) and current.func is not expand_kernel:
        dispatcher.register_kernels({KERNEL: expand_kernel})
