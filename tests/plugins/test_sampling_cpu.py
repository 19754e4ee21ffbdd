"""The sampler's kernel on a CPU: stock vLLM's writes nothing, ours what Triton's does; and sampling comes out right."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from laguna_serve.plugins.sampling_cpu import expand_kernel
from laguna_serve.serving.speculation import DRAFT_SAMPLING

pytestmark = pytest.mark.vllm

CU = torch.tensor([2, 5, 5, 6], dtype=torch.int32)
# In a process of its own, as kernels are replaced for good. Prints the shares of tokens after a verified draft, and the
# shares that there should be.
PROBE = """
import json, sys
from types import SimpleNamespace
import torch
import vllm._custom_ops
from vllm.platforms import current_platform
current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()
if sys.argv[1] == "mended":
    from laguna_serve.plugins.sampling_cpu import mend_sampling
    mend_sampling()
    mend_sampling()
from vllm.v1.sample import rejection_sampler
torch.manual_seed(0)
V, G, N, T = 6, 3, 100_000, 0.7
logits = torch.randn(G, V) * 1.5
drafts, draft_probs = torch.tensor([3, 1, 2], dtype=torch.int32).repeat(N), None
if sys.argv[2] == "probabilistic":
    draft_probs = torch.randn(G, V).softmax(-1).repeat(N, 1)
    drafts = draft_probs.multinomial(1).flatten().int()
cu = torch.arange(1, N + 1, dtype=torch.int32) * G
sampling = SimpleNamespace(
    all_greedy=False, all_random=True, temperature=torch.full((N,), T), top_k=None, top_p=None, generators={}
)
rejection_sampler.expand_batch_to_tokens(torch.full((N,), 9.0), cu, N * G)  # what the memory held before
target = rejection_sampler.apply_sampling_constraints(logits.repeat(N, 1), cu, sampling)
bonus = torch.full((N, 1), 5, dtype=torch.int32)
out = rejection_sampler.rejection_sample(drafts, [G] * N, G, cu, draft_probs, target, bonus, sampling)
first = torch.bincount(out[:, 0].long(), minlength=V)
after = torch.bincount(out[out[:, 1] >= 0, 1].long(), minlength=V)
expected = (logits / T).softmax(-1)
print(json.dumps([(first / N).tolist(), (after / after.sum()).tolist(), expected[0].tolist(), expected[1].tolist()]))
"""


def test_stock_kernel_writes_nothing() -> None:
    """When this fails, vLLM has mended it and plugins/sampling_cpu.py can go."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    current_platform.import_kernels()
    output = torch.full((6,), 7.5)
    _expand_kernel_impl(output, torch.tensor([1.0, 0.5, 2.0, 3.0]), CU, 0, 1)
    assert output.tolist() == [7.5] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_token_gets_its_requests_value(dtype: torch.dtype) -> None:
    output = torch.full((6,), 7, dtype=dtype)
    expand_kernel(output, torch.tensor([0, 5, 8, 2], dtype=dtype), CU, 0, 1)
    assert output.tolist() == [1, 1, 5, 5, 5, 2]


@pytest.mark.parametrize("drafts", DRAFT_SAMPLING)
def test_sampling_beside_a_draft_is_from_the_targets_distribution(drafts: str) -> None:
    run = subprocess.run([sys.executable, "-c", PROBE, "mended", drafts], capture_output=True, text=True, timeout=300)
    first, after, expected_first, expected_after = json.loads(run.stdout.splitlines()[-1])
    # Five standard errors of a share of 100,000, and of the 40,000 or so whose first draft is accepted.
    assert first == pytest.approx(expected_first, abs=0.008)
    assert after == pytest.approx(expected_after, abs=0.013)


def test_stock_sampling_beside_a_draft_is_not() -> None:
    run = subprocess.run([sys.executable, "-c", PROBE, "stock", "greedy"], capture_output=True, text=True, timeout=300)
    if run.returncode == 0:  # divided by whatever the memory held: it may also come to NaN, and to an error
        first, _, expected_first, _ = json.loads(run.stdout.splitlines()[-1])
        assert first != pytest.approx(expected_first, abs=0.008)
