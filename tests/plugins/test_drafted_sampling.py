"""The distribution of sampled tokens beside drafts: that of the target on ours, another on stock vLLM's CPU build."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess

import pytest
import torch
from warm import run_warm

from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING

pytestmark = pytest.mark.vllm

CU = torch.tensor([2, 5, 5, 6], dtype=torch.int32)
WISHES: tuple[dict[str, object], ...] = ({}, {"min_p": 0.15, "logit_bias": {"2": 1.5}}, {"min_p": 0.05, "top_k": 3})
# In a process of its own, as repairs are for good. Prints the shares of tokens after a verified draft, and the shares
# that there should be.
PROBE = """
import json, sys
from types import SimpleNamespace
import torch
import vllm._custom_ops
from vllm.platforms import current_platform
current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()
if sys.argv[1] == "repaired":
    from laguna_serve.plugins.repairs import repair_runner
    repair_runner()
from vllm import SamplingParams
from vllm.v1.sample import logits_processor, rejection_sampler
from vllm.v1.sample.logits_processor.state import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
V, G, N, T = 6, 3, 40_000, 0.7
def measure(kind, wish):
    torch.manual_seed(0)
    logits = torch.randn(G, V) * 1.5
    drafts, draft_probs = torch.tensor([3, 1, 2], dtype=torch.int32).repeat(N), None
    if kind == "probabilistic":
        draft_probs = torch.randn(G, V).softmax(-1).repeat(N, 1)
        drafts = draft_probs.multinomial(1).flatten().int()
    config = SimpleNamespace(speculative_config=True, scheduler_config=SimpleNamespace(max_num_seqs=N))
    processors = logits_processor.build_logitsprocs(config, torch.device("cpu"), False, False)
    biases = {int(token): bias for token, bias in wish.get("logit_bias", {}).items()}
    params = SamplingParams(temperature=T, min_p=wish.get("min_p", 0), logit_bias=biases or None)
    for processor in processors.all:
        added = [(row, params, [1], []) for row in range(N)]
        processor.update_state(BatchUpdate(batch_size=N, removed=[], moved=[], added=added))
    top_k = torch.full((N,), wish["top_k"]) if "top_k" in wish else None
    sampling = SamplingMetadata(
        temperature=torch.full((N,), T), all_greedy=False, all_random=True, top_p=None, top_k=top_k, generators={},
        max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=None,
        presence_penalties=None, repetition_penalties=None, output_token_ids=[], spec_token_ids=[],
        allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=processors,
    )
    rows = torch.arange(N * (G + 1)).view(N, G + 1)
    metadata = SpecDecodeMetadata(
        draft_token_ids=drafts, num_draft_tokens=[G] * N,
        cu_num_draft_tokens=torch.arange(1, N + 1, dtype=torch.int32) * G,
        cu_num_sampled_tokens=torch.arange(1, N + 1, dtype=torch.int32) * (G + 1),
        target_logits_indices=rows[:, :-1].flatten(), bonus_logits_indices=rows[:, -1], logits_indices=rows.flatten(),
    )
    # What the memory held before.
    rejection_sampler.expand_batch_to_tokens(torch.full((N,), 9.0), metadata.cu_num_draft_tokens, N * G)
    sampler = rejection_sampler.RejectionSampler(Sampler())
    out = sampler(metadata, draft_probs, torch.cat([logits, logits[:1]]).repeat(N, 1), sampling).sampled_token_ids
    first = torch.bincount(out[:, 0].long(), minlength=V)
    after = torch.bincount(out[out[:, 1] >= 0, 1].long(), minlength=V)
    for token, bias in biases.items():
        logits[:, token] += bias
    expected = (logits / T).softmax(-1)
    expected[expected < params.min_p * expected.amax(-1, keepdim=True)] = 0
    if top_k is not None:
        expected[expected < expected.topk(wish["top_k"]).values[:, -1:]] = 0
    expected /= expected.sum(-1, keepdim=True)
    return (first / N).tolist(), (after / after.sum()).tolist(), expected[0].tolist(), expected[1].tolist()
print(json.dumps([measure(*case) for case in json.loads(sys.argv[2])]))
"""


@functools.cache
def run_probe(kind: str) -> subprocess.CompletedProcess[str]:
    cases = list(itertools.product(DRAFT_SAMPLING, WISHES)) if kind == "repaired" else [("greedy", {})]
    return run_warm(PROBE, kind, json.dumps(cases))


def test_stock_kernel_writes_nothing() -> None:
    """When this fails, vLLM's own handing of values to rows works on a CPU: see plugins/repairs/drafted_sampling.py."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    current_platform.import_kernels()
    output = torch.full((6,), 7.5)
    _expand_kernel_impl(output, torch.tensor([1.0, 0.5, 2.0, 3.0]), CU, 0, 1)
    assert output.tolist() == [7.5] * 6


@pytest.mark.parametrize("wish", range(len(WISHES)))
@pytest.mark.parametrize("drafts", range(len(DRAFT_SAMPLING)))
def test_sampling_beside_a_draft_is_from_the_targets_distribution(drafts: int, wish: int) -> None:
    run = run_probe("repaired")
    assert run.returncode == 0, run.stderr[-2000:]
    first, after, expected_first, expected_after = json.loads(run.stdout.splitlines()[-1])[drafts * len(WISHES) + wish]
    # Five standard errors of a share of 40,000, and of the 8,000 or so at least whose first draft is accepted.
    assert first == pytest.approx(expected_first, abs=0.0125)
    assert after == pytest.approx(expected_after, abs=0.028)


def test_stock_sampling_beside_a_draft_is_not() -> None:
    run = run_probe("stock")
    if run.returncode == 0:  # divided by whatever the memory held: it may also come to NaN, and to an error
        first, _, expected_first, _ = json.loads(run.stdout.splitlines()[-1])[0]
        assert first != pytest.approx(expected_first, abs=0.0125)


def test_parsed_tokens_are_stock_vllms() -> None:
    from laguna_serve.plugins.repairs.verification import parse_output, stock_parse

    torch.manual_seed(0)
    for batch, width in ((1, 8), (5, 4), (3, 1)):
        tokens = torch.randint(-1, 12, (batch, width), dtype=torch.int32)
        for discarded in ((), [0], list(range(batch))):
            assert parse_output(tokens, 10, discarded) == stock_parse(tokens, 10, discarded)
