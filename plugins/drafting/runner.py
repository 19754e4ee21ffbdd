"""vLLM's CPU model runner for a DFlash drafter: what was accepted is read as the list that it is.

Checked against vLLM 0.32.0: `propose_draft_token_ids`, `_calc_spec_decode_metadata` and `_copy_draft_token_ids_to_cpu`
of the V1 runner, without asynchronous scheduling, which vLLM turns off on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from laguna_serve.plugins.drafting.proposer import CPUDFlashProposer
from laguna_serve.plugins.drafting.rows import find_verified, read_accepted


class DraftingModelRunner(CPUModelRunner):  # type: ignore[misc]
    """Model runner V1 whose DFlash drafter is a CPUDFlashProposer; other drafters are left to vLLM."""

    _draft_token_ids: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stock = gpu_model_runner.DFlashProposer
        gpu_model_runner.DFlashProposer = CPUDFlashProposer
        try:
            super().__init__(*args, **kwargs)
        finally:
            gpu_model_runner.DFlashProposer = stock

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> Any:
        """Draft behind what was accepted: tokens [batch, γ] int64."""
        drafter = self.drafter
        width = scheduler_output.num_spec_tokens_to_schedule
        if not isinstance(drafter, CPUDFlashProposer) or aux_hidden_states is None or not width:
            return super().propose_draft_token_ids(
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                common_attn_metadata,
                slot_mappings,
            )
        self._draft_probs = self._draft_prob_req_ids = None
        batch = self.input_batch
        reading = self.discard_request_mask.np[: batch.num_reqs]
        backup = [
            self.requests[request].get_token_id(batch.num_tokens_no_spec[index] - 1) if reads else None
            for index, (request, reads) in enumerate(zip(batch.req_ids, reading, strict=True))
        ]
        drafted = None if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        accepted = read_accepted(sampled_token_ids.tolist(), drafted, batch.vocab_size, backup)
        bounds = common_attn_metadata.query_start_loc_cpu.tolist()
        positions = self._get_positions(bounds[-1])
        wishes = [self.requests[request].sampling_params for request in batch.req_ids]
        cut = [row for row, wish in enumerate(wishes) if wish is not None and wish.structured_outputs is not None]
        drafts = drafter.draft(
            width, accepted, bounds, positions, aux_hidden_states, common_attn_metadata, sampling_metadata, cut
        )
        probabilities = drafter.take_last_draft_probs()
        if probabilities is not None:
            self._draft_probs, self._draft_prob_req_ids = probabilities, batch.req_ids.copy()
        return drafts

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: npt.NDArray[np.int32], cu_num_scheduled_tokens: npt.NDArray[np.int32]
    ) -> SpecDecodeMetadata:
        """Find the rows of a step that verify drafts, and the drafts, as the stock method does; without torch."""
        rows = find_verified(num_draft_tokens, cu_num_scheduled_tokens)
        drafts = self.input_ids.np[rows.logits][rows.target + 1]
        return SpecDecodeMetadata(
            draft_token_ids=torch.from_numpy(drafts),
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=torch.from_numpy(num_draft_tokens.cumsum(dtype=np.int32)),
            cu_num_sampled_tokens=torch.from_numpy(rows.bonus + 1),
            target_logits_indices=torch.from_numpy(rows.target),
            bonus_logits_indices=torch.from_numpy(rows.bonus),
            logits_indices=torch.from_numpy(rows.logits),
        )

    def _copy_draft_token_ids_to_cpu(self, scheduler_output: Any, zeros_only: bool = False) -> None:
        """Keep drafts as the list that the scheduler is given: they are on the CPU already."""
        if not isinstance(self._draft_token_ids, torch.Tensor):
            super()._copy_draft_token_ids_to_cpu(scheduler_output, zeros_only)
            return
        self.prev_num_spec_tokens = self._draft_token_ids.shape[1]
        self._draft_token_req_ids = self.input_batch.req_ids.copy()
        self._draft_token_ids = self._draft_token_ids.tolist()
