"""Drafts of a DFlash drafter with a sequential head, chosen one place after the other.

vLLM chooses all places of a block at once, from logits that it asks the drafter for.  Here each place's logits are
completed by the head with the token that was chosen before it, in the V1 proposer (CPU) and in the V2 speculator (GPU);
what rejection sampling is told of a drawn draft is the distribution that it was drawn from, given the draft's earlier
places.  A drafter without a head goes vLLM's own way.

The methods are replaced when a drafter with a head is loaded, not before.  Checked against vLLM 0.32.0
(v1/spec_decode/llm_base_proposer.py, v1/worker/gpu/spec_decode/dflash/speculator.py); the second has not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from laguna_serve.plugins.models.dflash_head import SequentialHead
from laguna_serve.plugins.sequential_head import HEAD

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
    places, state = head.start(hidden)
    token = self.input_ids[: len(hidden) * (gamma + 1) : gamma + 1]
    drafts, probabilities = [], []
    for place in range(gamma):
        state = head.advance(state, token, places[:, place])
        token, drawn_from = self._sample_from_logits(logits[:, place] + head.bias(state), sampling_metadata)
        drafts.append(token)
        if drawn_from is not None:
            probabilities.append(drawn_from)
    return torch.stack(drafts, 1).flatten(), torch.stack(probabilities, 1).flatten(0, 1) if probabilities else None


def serve_head() -> None:
    """Replace vLLM's methods; calling it again changes nothing."""
    DFlashProposer._sample_draft_tokens = sample_draft_tokens
