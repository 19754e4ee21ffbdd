"""vLLM's CPU model runner with the number of drafted tokens decided before every step (policy.py).

Drafts are proposed at a step's end, and the scheduler takes as many as it is given: here the decision is made, the
drafter's pass is as wide as it says, or left out, and what each request gets is cut to its number. A step's time is
from its beginning to the next one's, less the drafter's pass, where the next one has requests of it: then the engine
did not wait for work. In a step that also reads prompts the others decode; who ends with a step's tokens, by their
number, is not drafted for behind it, and nobody gets more drafts than there are tokens left for them.

The pass is left out, too, where a sequence leaves it no room below the maximum length (stock vLLM then drafts zeros for
all, and loses the context of the step).

Checked against vLLM 0.32.0: `KVCacheConfig.hash_block_size`, `propose_draft_token_ids`, `take_draft_token_ids`,
`_copy_draft_token_ids_to_cpu` and `_input_fits_in_drafter` of the V1 runner, without asynchronous scheduling, which
vLLM turns off on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.outputs import DraftTokenIds

from laguna_serve.plugins.adaptive.context import WaitingContext
from laguna_serve.plugins.adaptive.counters import Counters, open_counters
from laguna_serve.plugins.adaptive.policy import Policy
from laguna_serve.plugins.adaptive.prospect import PLAIN, Decision
from laguna_serve.plugins.adaptive.steps import Step, begin_step, count_left
from laguna_serve.plugins.drafting.runner import DraftingModelRunner

# Temperatures that share an estimate.
TEMPERATURES_PER_UNIT = 4


class AdaptiveModelRunner(DraftingModelRunner):
    """Model runner V1 for a DFlash drafter with `num_speculative_tokens` as the most."""

    speculative_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = Policy(self.num_spec_tokens)
        self._context = WaitingContext()
        self._counters: Counters | None = open_counters()
        self._decision, self._drafted_for = PLAIN, dict[str, int]()
        self._step_under_way: Step | None = None
        self._fits = True

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure the step before, write the context whose blocks may change hands, and run the target."""
        now = perf_counter()
        self._end_step(now, scheduler_output)
        self._care_for_context(scheduler_output)
        for request in scheduler_output.finished_req_ids:
            self._tell_of_end(request)
        for new in scheduler_output.scheduled_new_reqs:
            self.policy.add(new.req_id, _find_kind(new.sampling_params))
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _tell_of_end(self, request: str) -> None:
        """Tell the policy of an end, and of how much of the prompt's context drafts alone needed."""
        state = self.requests.get(request)
        if state is None:
            self.policy.drop(request)
        else:
            needed = max(0, state.num_prompt_tokens - self._find_unread(request))
            self.policy.drop(request, needed, len(state.output_token_ids))

    @cached_property
    def _drafter_slides(self) -> bool:
        """Whether the drafter gives blocks back that its window has left behind, of requests that go on."""
        modules = self.drafter.model.modules()
        return any(isinstance(module, Attention) and module.sliding_window is not None for module in modules)

    def _care_for_context(self, scheduler_output: Any) -> None:
        """Write, or forget, the context whose blocks may change hands or be found in this step."""
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        if self._drafter_slides:
            self._write_context()
            return
        if gone:
            unread = {request: self._find_unread(request) for request in gone}
            self._pass_time(lambda: self._context.end(self.drafter.model, unread))
        if self.cache_config.enable_prefix_caching and _finds_blocks(scheduler_output):
            self._write_context()

    def _find_unread(self, request: str) -> int:
        """Find the position of a request that ends from which on nobody can read its context any more.

        The prefix cache finds whole blocks of tokens that are known, and nothing else.
        """
        if not self.cache_config.enable_prefix_caching:
            return 0
        state, block = self.requests.get(request), self.kv_cache_config.hash_block_size
        if state is None or not block:
            return int(self.max_model_len)
        return int((state.num_prompt_tokens + len(state.output_token_ids)) // block * block)

    def _write_context(self) -> None:
        """Write all that waits, outside of the step under way."""
        self._pass_time(lambda: self._context.write(self.drafter.model))

    def _pass_time(self, act: Callable[[], None]) -> None:
        """Do what is no part of the step under way."""
        begin = perf_counter()
        act()
        if self._step_under_way is not None:
            self._step_under_way.began += perf_counter() - begin

    def _end_step(self, now: float, scheduler_output: Any) -> None:
        """Close the books on the step before, and open them for this one."""
        scheduled = scheduler_output.num_scheduled_tokens
        step = self._step_under_way
        if step is not None and not step.requests.isdisjoint(scheduled):
            self.policy.observe_step(step.end(now))
            if self._counters is not None and not step.prompt:
                self._counters.add(step.drafted, step.decoding, now - step.began)
        self._step_under_way = begin_step(now, scheduler_output, self.requests) if scheduled else None

    def _prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare a step that verifies nothing as an engine without a drafter does: no rows of drafts to look for."""
        if scheduler_output.scheduled_spec_decode_tokens:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        speculation, self.speculative_config = self.speculative_config, None
        try:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        finally:
            self.speculative_config = speculation

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Say yes, so that drafts are proposed whenever there is a drafter: whether they fit is decided there."""
        self._fits = super()._input_fits_in_drafter(common_attn_metadata)
        return common_attn_metadata is not None

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
        """Learn of the drafts that were verified, decide, and draft: tokens [batch, width] int64, width 0 for none."""
        counts = None if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        counts = counts if counts is not None and any(counts) else None
        valid = None if counts is None else (sampled_token_ids != -1).sum(dim=1).tolist()
        if counts is not None and valid is not None:
            self._observe(counts, valid)
        self._decision = self._decide(valid)
        width = self._decision.width
        if not width:
            assert aux_hidden_states is not None, "a DFlash drafter taps the target"
            kept = None if counts is None else _find_kept(common_attn_metadata, counts, valid or [])
            rows = common_attn_metadata.num_actual_tokens
            slots = common_attn_metadata.slot_mapping[:rows]
            owners = _list_owners(self.input_batch.req_ids, common_attn_metadata)
            self._context.add(aux_hidden_states, self._get_positions(rows), slots, owners, kept)
            if self._context.is_full:
                self._write_context()
            return torch.empty(self.input_batch.num_reqs, 0, dtype=torch.int64)
        self._write_context()
        begin = perf_counter()
        scheduler_output.num_spec_tokens_to_schedule = width
        drafts = super().propose_draft_token_ids(
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
        if self._step_under_way is not None:
            self._step_under_way.width, self._step_under_way.drafter_s = width, perf_counter() - begin
        return drafts

    def _copy_draft_token_ids_to_cpu(self, scheduler_output: Any, zeros_only: bool = False) -> None:
        """Leave out what no drafts need: it takes two percent of a small model's step."""
        if self._decision.width or zeros_only:
            super()._copy_draft_token_ids_to_cpu(scheduler_output, zeros_only)
        else:
            self.prev_num_spec_tokens = 0

    def _observe(self, counts: list[int], valid: list[int]) -> None:
        """Tell the policy what became of its drafts; placeholders of the scheduler's are none."""
        drafts = []
        for request, count, tokens in zip(self.input_batch.req_ids, counts, valid, strict=True):
            if count and (drafted := min(count, self._drafted_for.get(request, 0))) and tokens:
                drafts.append((request, drafted, min(tokens - 1, drafted)))
        if drafts:
            self.policy.observe_drafts(drafts)

    def _decide(self, valid: list[int] | None) -> Decision:
        """Decide for the requests that decode in the next step, not those that still read or that end with this one.

        `valid`: how many tokens each request got in this step, None for one each.
        """
        batch = self.input_batch
        if len(batch.req_ids) == 1 and valid is None and self.policy.repeat_plain(batch.req_ids):
            self._drafted_for = {}
            return PLAIN  # whether the one ends with this step matters to nobody
        reading = self.discard_request_mask.np[: batch.num_reqs].tolist()
        requests, room = [], []
        for index, (request, reads) in enumerate(zip(batch.req_ids, reading, strict=True)):
            tokens = 1 if valid is None else valid[index]
            left = 0 if reads else count_left(self.requests[request], tokens, self.max_model_len)
            if left > 0:
                requests.append(request)
                room.append(left - 1)
        self.policy.row_s = self._context.row_s
        reads = 0 if self._step_under_way is None else self._step_under_way.prompt
        waiting_s = (self._context.rows + reads) * self._context.row_s
        decision = self.policy.decide(requests, waiting_s, room) if self._fits else PLAIN
        self._drafted_for = dict(zip(requests, decision.counts, strict=True)) if decision.width else {}
        return decision

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Hand each request's drafts to the scheduler, cut to its number; None for no drafts at all."""
        if not self._decision.width:
            return None
        taken = super().take_draft_token_ids()
        if taken is None:
            return None
        cut = [
            tokens[: self._drafted_for.get(request, 0)]
            for request, tokens in zip(taken.req_ids, taken.draft_token_ids, strict=True)
        ]
        return DraftTokenIds(taken.req_ids, cut)


def _finds_blocks(scheduler_output: Any) -> bool:
    """Whether a request may find blocks through the prefix cache in this step."""
    cached = scheduler_output.scheduled_cached_reqs
    return bool(cached.resumed_req_ids) or any(new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs)


def _find_kind(sampling: Any) -> int:
    """Find which requests are expected to accept alike: by their temperature, 0 for greedy ones."""
    return 0 if sampling is None else -int(-sampling.temperature * TEMPERATURES_PER_UNIT // 1)


def _list_owners(requests: Sequence[str], common_attn_metadata: Any) -> list[str]:
    """List whose each row of a step is."""
    if common_attn_metadata.num_actual_tokens == len(requests):
        return list(requests)
    bounds = common_attn_metadata.query_start_loc_cpu.tolist()
    return [request for i, request in enumerate(requests) for _ in range(bounds[i], bounds[i + 1])]


def _find_kept(common_attn_metadata: Any, counts: list[int], valid: list[int]) -> torch.Tensor:
    """Rows of a step that hold committed tokens: of each request all but its rejected drafts, which are its last."""
    bounds = common_attn_metadata.query_start_loc_cpu.tolist()
    rows: list[int] = []
    for index, (count, tokens) in enumerate(zip(counts, valid, strict=True)):
        rejected = max(0, count + 1 - tokens) if count else 0
        rows += range(bounds[index], bounds[index + 1] - rejected)
    return torch.tensor(rows, dtype=torch.int64)
