"""The Laguna-format DFlash drafter with the rotary embedding and the sequential head that its config.json names.

Published drafters say `rope_theta: 500000` and no `rope_parameters`. From transformers 5.17 on LagunaConfig drops that
key in favour of its own defaults, under which sliding layers, which is all that these drafters have, rotate with a
theta of 10,000: keys and queries other than those it was trained with, and proposals that are seldom accepted. vLLM's
--hf-overrides do not reach a drafter's config, hence a class. A drafter that leaves `draft_vocab_size` out drafts
every token, which vLLM asks to be said.

Checked against vLLM 0.32.0 with transformers 5.19.0. But for the head it can go when
`tests/plugins/test_dflash.py::test_stock_drops_the_published_theta` fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import laguna_dflash
from vllm.platforms import current_platform

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.formats.sequential_head import read_rank
from laguna_serve.plugins.layers import DEFAULT_ROPE, find_dropped_rope
from laguna_serve.plugins.models.dflash_head import SequentialHead


def complete_config(config: Any) -> None:
    """Write what a drafter's config.json says, and LagunaConfig did not take over, into its Hugging Face config."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or {kind: rope.get(kind) for kind in DEFAULT_ROPE} == DEFAULT_ROPE:
        # Not rope_scaling, which transformers answers with its own defaults, and would have read.
        stated = find_dropped_rope({key: getattr(config, key, None) for key in ("rope_theta", "partial_rotary_factor")})
        if stated is not None:
            config.rope_parameters = {kind: dict(stated) for kind in DEFAULT_ROPE}
    if getattr(config, "draft_vocab_size", None) is None:
        config.draft_vocab_size = config.vocab_size


class DFlashLagunaForCausalLM(laguna_dflash.DFlashLagunaForCausalLM):  # type: ignore[misc]
    """vLLM's class on a completed config, with a head where it has one."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.speculative_config.draft_model_config.hf_config
        complete_config(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rank = read_rank(config.dflash_config)
        if rank is not None:
            # vLLM's proposer brings every drafter's model along: not where no head is to be served.
            from laguna_serve.plugins.models.dflash_drafts import serve_head

            self.model.sequential_head = SequentialHead(config.vocab_size, config.hidden_size, rank)
            if current_platform.is_cpu():  # where oneDNN's small products in bf16 take five times as long
                self.model.sequential_head.float()
            serve_head()

    @refuse_incomplete
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a drafter's tensors; returns the names of the parameters that were set."""
        loaded: set[str] = super().load_weights(weights)
        return loaded
