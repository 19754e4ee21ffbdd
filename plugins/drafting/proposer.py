"""vLLM's DFlash proposer for a CPU: the same drafts from the same rows, without padding, padding's kernels and copies.

Stock vLLM hands rejected rows to the drafter's context, too, as a GPU cannot count them in time. They lie behind the
last committed token, where the drafter's own rows are written before anything is read, and are left out here.

Checked against vLLM 0.32.0: `SpecDecodeBaseProposer.propose`, `DFlashProposer.set_inputs_first_pass` and
`GPUModelRunner.propose_draft_token_ids`. tests/plugins/test_drafting.py compares drafts with stock vLLM's, step by
step; where something is asked for that is not handled here, stock vLLM's functions are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.dflash import DFlashProposer

from laguna_serve.plugins.drafting.context import store_taps
from laguna_serve.plugins.drafting.rows import Accepted, Queries, find_kept, place_queries


class CPUDFlashProposer(DFlashProposer):  # type: ignore[misc]
    """A DFlash drafter whose rows are counted on the CPU."""

    def load_model(self, target_model: Any) -> None:
        """Load the drafter, and prepare what its steps compute."""
        super().load_model(target_model)
        if hasattr(self.model, "prepare_context"):
            self.model.prepare_context()

    def draft(
        self,
        width: int,
        accepted: Accepted,
        bounds: Sequence[int],
        positions: torch.Tensor,
        taps: Sequence[torch.Tensor],
        cad: CommonAttentionMetadata,
        sampling_metadata: Any,
        cut: Sequence[int] = (),
    ) -> torch.Tensor:
        """Write the context of a step's committed rows, and draft behind them.

        Args:
            width: tokens to draft, γ.
            accepted: what became of the step.
            bounds: [batch + 1], where each request's rows begin, and their end.
            positions: [rows].
            taps: the target's hidden states, each [≥ rows, hidden], all of one length.
            cad: of the step, of the drafter's group of layers.
            cut: requests whose drafts a grammar may cut before they are verified. What stands behind a cut is drawn
                without regard to the draft that was cut, which is exact for a likeliest draft and for no drawn one;
                theirs are the likeliest.

        Returns:
            Tokens [batch, width] int64.
        """
        self.num_speculative_tokens, self._last_draft_probs = width, None
        kept = find_kept(bounds, accepted.rejected)
        # The slots of the context are the step's own, as one table of blocks serves the drafter's group of layers.
        slots = cad.slot_mapping
        store_taps(self.model, torch.cat(list(taps), dim=-1)[kept], positions[kept], slots[kept])
        rows, metadata = self._place(width, accepted, bounds, positions, cad)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=rows,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=self._get_slot_mapping(rows),
        ):
            states = self.model(input_ids=self.input_ids[:rows], positions=self.positions[:rows], inputs_embeds=None)
        masks = states.view(len(accepted.last), width + 1, -1)[:, 1:].flatten(0, 1)
        if cut and sampling_metadata.temperature is not None:
            temperature = sampling_metadata.temperature.clone()
            temperature[list(cut)] = 0
            sampling_metadata = replace(sampling_metadata, temperature=temperature, all_random=False)
        tokens, probabilities = self._sample_draft_tokens(masks, sampling_metadata)
        drafts: torch.Tensor = tokens.view(-1, width)
        if probabilities is not None:
            self._last_draft_probs = probabilities.view(-1, width, probabilities.shape[-1]).contiguous()
            for request in cut:
                self._last_draft_probs[request].zero_().scatter_(1, drafts[request].unsqueeze(1), 1)
        return drafts

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Likeliest tokens [rows] by the plain sampler's operation, which takes a third of `argmax`'s time."""
        tokens: torch.Tensor
        if self.use_local_argmax_reduction or self.use_heterogeneous_vocab:
            tokens = super()._greedy_sample(hidden_states)
        else:
            tokens = Sampler.greedy_sample(self.model.compute_logits(hidden_states).to(torch.float32))
        return tokens

    def _place(
        self,
        width: int,
        accepted: Accepted,
        bounds: Sequence[int],
        positions: torch.Tensor,
        cad: CommonAttentionMetadata,
    ) -> tuple[int, dict[str, object]]:
        """Put the rows to compute into the buffers; their number, and the attention's metadata."""
        batch, each = len(accepted.last), width + 1
        rows = batch * each
        lengths = np.empty(batch, np.int32)
        queries = Queries(self.input_ids.numpy(), self.positions.numpy(), self._slot_mapping_buffer.numpy(), lengths)
        place_queries(
            accepted,
            bounds,
            positions.numpy(),
            cad.seq_lens.numpy(),
            cad.block_table_tensor.numpy(),
            self.block_size,
            self.parallel_drafting_token_id,
            each,
            queries,
        )
        starts = torch.from_numpy(np.arange(0, rows + 1, each, dtype=np.int32))
        bound = cad.seq_lens_cpu_upper_bound
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=torch.from_numpy(lengths),
                seq_lens_cpu_upper_bound=None if bound is None else bound + each,
                num_reqs=cad.num_reqs,
                num_actual_tokens=rows,
                max_query_len=each,
                max_seq_len=cad.max_seq_len + each,
                block_table_tensor=cad.block_table_tensor,
                slot_mapping=self._slot_mapping_buffer[:rows],
                causal=self.dflash_causal,
            )
        )
        return rows, metadata
