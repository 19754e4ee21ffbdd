"""Drafts of a DFlash drafter with a sequential head, chosen one place after the other.

vLLM chooses all places of a block at once, from logits that it asks the drafter for. Here each place's logits are
completed by the head with the token that was chosen before it, in the V1 proposer (CPU) and in the V2 speculator (GPU);
what rejection sampling is told of a drawn draft is the distribution that it was drawn from, given the draft's earlier
places. A drafter without a head goes vLLM's own way.

The methods are replaced when a drafter with a head is loaded, not before. Checked against vLLM 0.32.0
(v1/spec_decode/llm_base_proposer.py, v1/worker/gpu/spec_decode/dflash/speculator.py); the second has not run on a GPU,
and is refused before 0.30, which draws drafts by other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from laguna_serve.plugins.drafting.head import draft_block, prepare
from laguna_serve.plugins.formats.sequential_head import HEAD
from laguna_serve.plugins.models.dflash_head import SequentialHead

Drafts = tuple[torch.Tensor, torch.Tensor | None]


def find_head(model: Any) -> SequentialHead | None:
    """Find the head of a drafter as vLLM holds it."""
    head: SequentialHead | None = getattr(model.model, HEAD, None)
    return head


def sample_draft_tokens(
    self: DFlashProposer, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
) -> Drafts:
    """`DFlashProposer._sample_draft_tokens`: drafts [batch · γ] and, where they are drawn, [batch · γ, V] float32.

    hidden_states [batch · γ, H], a request's places one after the other; the blocks' anchors are in the input ids.
    """
    head = find_head(self.model)
    if head is None:
        stock: Drafts = SpecDecodeBaseProposer._sample_draft_tokens(self, hidden_states, sampling_metadata)
        return stock
    gamma = self.num_speculative_tokens
    hidden = hidden_states.unflatten(0, (-1, gamma))
    logits = self.model.compute_logits(hidden_states).unflatten(0, (-1, gamma))
    token = self.input_ids[: len(hidden) * (gamma + 1) : gamma + 1]
    if hidden.device.type == "cpu":
        draws = self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy
        temperature = sampling_metadata.temperature if draws else None
        tokens, probs = draft_block(head, hidden.to(torch.float32), logits.to(torch.float32), token, temperature)
        return tokens.flatten(), None if probs is None else probs.flatten(0, 1)
    places, state = head.start(hidden)
    drafts, probabilities = [], []
    for place in range(gamma):
        state = head.advance(state, token, places[:, place])
        token, drawn_from = self._sample_from_logits(logits[:, place] + head.bias(state), sampling_metadata)
        drafts.append(token)
        if drawn_from is not None:
            probabilities.append(drawn_from)
    return torch.stack(drafts, 1).flatten(), torch.stack(probabilities, 1).flatten(0, 1) if probabilities else None


def generate_draft(self: Any, stock: Callable[..., None], num_reqs: int, *args: Any, **kwargs: Any) -> None:
    """`DFlashSpeculator._generate_draft`: write the drafts [requests, γ], and what they are drawn from where they are.

    Nothing here depends on values, so that a CUDA graph can hold it, as it holds the stock method, which `stock` is.

    Raises:
        ValueError: vLLM's speculator draws drafts in another way than this one knows.
    """
    head = find_head(self.model)
    if head is None:
        stock(self, num_reqs, *args, **kwargs)
        return
    if not hasattr(self, "_maybe_predict_acceptance"):
        remedy = "upgrade vLLM, or serve a drafter without sequential_head in its config.json"
        raise ValueError(
            f"sequential head: expected vLLM 0.30 or later on this device, got {vllm.__version__}; {remedy}"
        )
    gamma = self.num_speculative_steps
    count = num_reqs * gamma
    hidden = self._run_model(*args, **kwargs)[self.sample_indices[:count]]
    logits = self.model.compute_logits(hidden).unflatten(0, (-1, gamma))
    places, state = head.start(hidden.unflatten(0, (-1, gamma)))
    positions, slots = (rows[:count].view(-1, gamma) for rows in (self.sample_pos, self.sample_idx_mapping))
    token = self.input_buffers.input_ids[: num_reqs * (gamma + 1) : gamma + 1]
    for place in range(gamma):
        state = head.advance(state, token, places[:, place])
        # A position's random numbers are keyed by the one before it. One column for all rows is said by a scalar: what
        # predicts acceptance takes a tensor of them for all places of a request, one after the other.
        at = (slots[:, place], positions[:, place] - 1, self.sample_col[place])
        token = _choose(self, logits[:, place] + head.bias(state), *at)
        self.draft_tokens[:num_reqs, place] = token


def _choose(
    self: Any, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """Choose a token for each row of logits as `DraftModelSpeculator.sample_draft` does, which asks for them itself."""
    if self.draft_logits is None:
        token = logits.argmax(dim=-1)
    else:
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

        draw = gumbel_sample if self.draft_watermarker is None else self.draft_watermarker.sample
        token = draw(
            logits,
            slots,
            self.temperature,
            self.seeds,
            positions,
            apply_temperature=True,
            is_drafting=True,
            logits_cache=self.draft_logits,
            logits_cache_col=column,
            use_fp64=self.use_fp64_gumbel,
        )
    self._maybe_predict_acceptance(logits, slots, column)
    return token


def serve_head() -> None:
    """Replace vLLM's methods; calling it again changes nothing."""
    DFlashProposer._sample_draft_tokens = sample_draft_tokens
    if current_platform.is_cpu():  # has the V1 runner alone
        prepare()
        return
    from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

    stock = DFlashSpeculator._generate_draft
    if not getattr(stock, "serves_head", False):

        def generate(self: DFlashSpeculator, *args: Any, **kwargs: Any) -> None:
            generate_draft(self, stock, *args, **kwargs)

        generate.serves_head = True  # type: ignore[attr-defined]
        DFlashSpeculator._generate_draft = generate
