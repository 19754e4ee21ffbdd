"""Sampling parameters beside a drafter: what comes out is what comes out without one.

To verify n drafts of a request, n + 1 rows of logits are sampled from: n *target* rows, one per draft, and the *bonus*
row behind them. vLLM's V1 rejection sampler, on a CPU,

- hands temperature, top-k and top-p to the target rows through `expand_kernel`, whose replacement
  (`_expand_kernel_impl` in utils/cpu_triton_utils.py) writes into an int64 copy of a float output and drops it: logits
  are divided by uninitialised memory. bench/sampling.py found it: on the toy pair the likeliest second token came in
  41% of the completions instead of 20%;
- fails on a step without drafts (every prefill) beside `top_k` alone, where it takes the maximum of no rows: the
  engine ends;
- leaves `logit_bias` and `min_p` out of the target rows, for which vLLM refuses them beside a drafter with a 400;
- masks the stop tokens of the bonus row until `min_tokens` tokens are *committed*, although n more stand before it;
- returns no log-probabilities for `logprob_token_ids`, and ends the engine when a neighbour asks for `logprobs`;
- draws other numbers from a request's `seed` than sampling without a drafter does, and as many as the drafts need.

Where all requests are greedy, or have a temperature, and nothing else is asked for, verification.py does it by few
operations. Otherwise all rows are processed as the plain sampler processes its one, in its order: bias, penalties,
masks; temperature, min_p, top-k, top-p. A request with a seed draws each row's token as the plain sampler would and
keeps the drafts for as long as they are those tokens: the same seed gives the same text with and without a drafter.
For drafts that are the drafter's likeliest tokens this accepts as many as rejection sampling; of drawn drafts it
accepts fewer.

Checked against vLLM 0.32.0. It can go when `tests/plugins/test_repairs.py::test_stock_sampling_beside_drafts` fails
in each of its lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample import logits_processor as processors
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor.state import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from laguna_serve.plugins.repairs.token_logprobs import gather
from laguna_serve.plugins.repairs.verification import parse_output, verify_drawn, verify_likeliest

stock_build = processors.build_logitsprocs


class BonusMinTokens(processors.MinTokensLogitsProcessor):  # type: ignore[misc]
    """`min_tokens` on bonus rows, with the drafts before them counted."""

    def __init__(self, stock: processors.MinTokensLogitsProcessor, num_drafts: list[int]) -> None:
        """Take the stock processor, whose state is read, and the number of drafts per request of this step."""
        self.stock, self.num_drafts = stock, num_drafts

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask the stop tokens of requests that would end too early; logits [batch, vocabulary]."""
        rows: list[int] = []
        tokens: list[int] = []
        restorable: list[bool] = []
        for request, (least, output, stops, structured) in self.stock.min_toks.items():
            if least - len(output) > self.num_drafts[request]:
                rows += [request] * len(stops)
                tokens += stops
                restorable += [structured] * len(stops)
        where, kept = (torch.tensor(rows), torch.tensor(tokens)), torch.tensor(restorable)
        if rows:
            self.stock._mask_stop_token_logits(logits, where, (where[0][kept], where[1][kept]))
        return logits


def build_logitsprocs(
    vllm_config: Any,
    device: torch.device,
    is_pin_memory: bool,
    is_pooling_model: bool,
    custom_logitsprocs: Sequence[Any] = (),
) -> LogitsProcessors:
    """vLLM's, with the processors of `logit_bias` and `min_p` beside a drafter, too; custom ones are refused there."""
    if not vllm_config.speculative_config or is_pooling_model or custom_logitsprocs:
        return stock_build(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
    return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in processors.BUILTIN_LOGITS_PROCESSORS)


def allow(self: SamplingParams, speculative_config: object) -> None:
    """`SamplingParams._validate_spec_decode`: nothing has to be refused beside a drafter."""


def forward(
    self: RejectionSampler,
    metadata: SpecDecodeMetadata,
    draft_probs: torch.Tensor | None,
    logits: torch.Tensor,
    sampling_metadata: SamplingMetadata,
) -> SamplerOutput:
    """`RejectionSampler.forward`: tokens [batch, 1 + most drafts] int32, -1 behind a request's last.

    Args:
        metadata: where the rows of each request are, and its drafts.
        draft_probs: [drafts, vocabulary] where drafts were drawn, else None.
        logits: [drafts + batch, vocabulary], overwritten or not.
        sampling_metadata: of the batch; its generators are left as plain sampling would leave them.
    """
    counts = metadata.num_draft_tokens
    if not any(counts):
        bonus = logits[metadata.bonus_logits_indices]
        output: SamplerOutput = self.sampler(bonus, sampling_metadata, predict_bonus_token=True)
        return output
    asks_logprobs = sampling_metadata.max_num_logprobs is not None or bool(sampling_metadata.logprob_token_ids)
    if sampling_metadata.all_greedy and not asks_logprobs and _asks_nothing_else(sampling_metadata):
        tokens = verify_likeliest(logits, metadata.draft_token_ids, counts)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
    if _takes_temperature_alone(self, sampling_metadata):
        drafts, temperature = metadata.draft_token_ids, sampling_metadata.temperature
        tokens, logprobs = verify_drawn(logits, temperature, drafts, counts, draft_probs), None
        if asks_logprobs:
            logprobs = _gather_logprobs(self, logits.to(torch.float32), tokens, metadata, sampling_metadata)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    bonus = logits[metadata.bonus_logits_indices]
    bonus = self.sampler.apply_logits_processors(
        bonus.to(torch.float32), replace(sampling_metadata, logitsprocs=_for_bonus(sampling_metadata, counts)), True
    )
    raw_target = logits[metadata.target_logits_indices].to(torch.float32)
    target = _add_biases(raw_target.clone(), sampling_metadata, counts)
    target = self.apply_logits_processors(target, sampling_metadata, metadata)
    target = _constrain(target, sampling_metadata, counts)

    drawn = _draw_seeded(self, target, metadata, sampling_metadata.generators)
    reached = {
        row: generator
        for row, generator in sampling_metadata.generators.items()
        if row not in drawn or drawn[row].accepted == counts[row]
    }
    bonus_tokens, processed_bonus = self.sampler.sample(bonus, replace(sampling_metadata, generators=reached))
    tokens = rejection_sampler.rejection_sample(
        metadata.draft_token_ids,
        counts,
        metadata.max_spec_len,
        metadata.cu_num_draft_tokens,
        draft_probs,
        target,
        bonus_tokens.to(torch.int32).unsqueeze(-1),
        replace(sampling_metadata, generators={}),
        synthetic_mode=self.synthetic_mode,
        synthetic_conditional_rates=self.synthetic_conditional_rates,
        use_fp64_gumbel=self.use_fp64_gumbel,
    )
    for row, result in drawn.items():
        ended = [*result.tokens, int(bonus_tokens[row])] if result.accepted == counts[row] else result.tokens
        tokens[row] = PLACEHOLDER_TOKEN_ID
        tokens[row, : len(ended)] = torch.tensor(ended, dtype=tokens.dtype)

    logprobs = None
    if asks_logprobs:
        processed = self.is_processed_logprobs_mode
        rows = logits.to(torch.float32, copy=True)
        rows[metadata.target_logits_indices] = target if processed else raw_target
        rows[metadata.bonus_logits_indices] = (
            processed_bonus if processed else logits[metadata.bonus_logits_indices].to(torch.float32)
        )
        logprobs = _gather_logprobs(self, rows, tokens, metadata, sampling_metadata)
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def _asks_nothing_else(sampling_metadata: SamplingMetadata) -> bool:
    """Whether no logits are to be processed but by temperature, min_p, top-k and top-p."""
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(map(_is_idle, sampling_metadata.logitsprocs.non_argmax_invariant))
    )


def _takes_temperature_alone(self: RejectionSampler, sampling_metadata: SamplingMetadata) -> bool:
    """Whether every request is sampled, without a seed, by a temperature and nothing else."""
    return (
        sampling_metadata.all_random
        and not sampling_metadata.generators
        and sampling_metadata.top_k is None
        and sampling_metadata.top_p is None
        and all(map(_is_idle, sampling_metadata.logitsprocs.argmax_invariant))
        and not (self.is_processed_logprobs_mode or self.synthetic_mode or self.use_fp64_gumbel)
        and _asks_nothing_else(sampling_metadata)
    )


def _is_idle(processor: processors.LogitsProcessor) -> bool:
    """Whether a processor has nothing to do for any request; unknown ones have."""
    if isinstance(processor, processors.LogitBiasLogitsProcessor):
        return not processor.biases
    if isinstance(processor, processors.MinPLogitsProcessor):
        return not processor.min_p_count
    return isinstance(processor, processors.MinTokensLogitsProcessor) and not processor.min_toks


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens drawn for a request with a seed, up to and including the first that is not its draft."""

    tokens: list[int]
    accepted: int


def _draw_seeded(
    self: RejectionSampler, target: torch.Tensor, metadata: SpecDecodeMetadata, generators: dict[int, torch.Generator]
) -> dict[int, Drawn]:
    """Draw, for every request with a seed and drafts, what plain sampling would, a token after the other."""
    drafts = metadata.draft_token_ids.tolist()
    drawn = {}
    for row, (start, end) in enumerate(pairwise(accumulate(metadata.num_draft_tokens, initial=0))):
        if row not in generators or start == end:
            continue
        tokens: list[int] = []
        accepted = 0
        for position in range(start, end):
            logits = target[position : position + 1].clone()
            token, _ = self.sampler.topk_topp_sampler(logits, {0: generators[row]}, None, None)
            tokens.append(int(token))
            if tokens[-1] != drafts[position]:
                break
            accepted += 1
        drawn[row] = Drawn(tokens, accepted)
    return drawn


def _for_bonus(sampling_metadata: SamplingMetadata, counts: list[int]) -> LogitsProcessors:
    return LogitsProcessors(
        BonusMinTokens(processor, counts) if isinstance(processor, processors.MinTokensLogitsProcessor) else processor
        for processor in sampling_metadata.logitsprocs.all
    )


def _add_biases(target: torch.Tensor, sampling_metadata: SamplingMetadata, counts: list[int]) -> torch.Tensor:
    """`logit_bias` on every target row [drafts, vocabulary], in place."""
    bounds = list(accumulate(counts, initial=0))
    for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
        if isinstance(processor, processors.LogitBiasLogitsProcessor):
            for request, biases in processor.biases.items():
                columns, values = torch.tensor(list(biases)), torch.tensor(list(biases.values()), dtype=torch.float32)
                target[bounds[request] : bounds[request + 1], columns] += values
    return target


def _constrain(target: torch.Tensor, sampling_metadata: SamplingMetadata, counts: list[int]) -> torch.Tensor:
    """Temperature, min_p, top-k and top-p on every target row; nothing where all requests are greedy."""
    if sampling_metadata.all_greedy:
        return target
    repeats = torch.tensor(counts)
    temperature = sampling_metadata.temperature.repeat_interleave(repeats)
    target.div_(temperature.masked_fill(temperature == rejection_sampler.GREEDY_TEMPERATURE, 1).unsqueeze(-1))
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, processors.MinPLogitsProcessor) and processor.min_p_count:
            probabilities = target.softmax(-1)
            least = processor.min_p.repeat_interleave(repeats, 0) * probabilities.amax(-1, keepdim=True)
            target.masked_fill_(probabilities < least, float("-inf"))
    top_k, top_p = (
        None if values is None else values.repeat_interleave(repeats)
        for values in (sampling_metadata.top_k, sampling_metadata.top_p)
    )
    constrained: torch.Tensor = apply_top_k_top_p(target, top_k, top_p)
    return constrained


def _gather_logprobs(
    self: RejectionSampler,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    metadata: SpecDecodeMetadata,
    sampling_metadata: SamplingMetadata,
) -> LogprobsTensors:
    """Log-probabilities [batch × (1 + most drafts), columns] of the tokens; those behind a request's last mean nothing.

    rows: [drafts + batch, vocabulary] float32, each request's rows one after the other.
    """
    width = tokens.shape[1]
    starts = torch.tensor([0, *accumulate(count + 1 for count in metadata.num_draft_tokens)][:-1])
    indices = (starts.unsqueeze(1) + torch.arange(width)).flatten().clamp_(max=rows.shape[0] - 1)
    scores = rows if self.is_logits_logprobs_mode else self.sampler.compute_logprobs(rows)
    named = {
        request * width + position: ids
        for request, ids in (sampling_metadata.logprob_token_ids or {}).items()
        for position in range(width)
    }
    sampled = tokens.flatten().to(torch.int64).clamp_(min=0)
    return gather(scores[indices], sampled, sampling_metadata.max_num_logprobs, named)


def apply() -> None:
    """Replace vLLM's methods and function."""
    SamplingParams._validate_spec_decode = allow
    RejectionSampler.forward = forward
    RejectionSampler.parse_output = staticmethod(parse_output)
    processors.build_logitsprocs = build_logitsprocs


def apply_to_runner() -> None:
    """Replace the function where the model runner's module has its own name for it."""
    from vllm.v1.worker import gpu_model_runner

    gpu_model_runner.build_logitsprocs = build_logitsprocs
