"""Drafts verified by few operations, where requests ask for nothing but greedy tokens, or nothing but a temperature.

Beside a temperature vLLM prepares every row for every parameter, draws a replacement for each draft and a token behind
them, and has a kernel choose among them: some hundred small operations on a CPU. Of a request's rows one alone is
drawn from in the end, that of its first rejected draft, or the one behind its last. Which one it is depends on the
drafts' own chances alone, so that it is found first (arXiv:2211.17192, algorithm 1).

With p the target's distribution at a row and q what its draft x was drawn from (for likeliest drafts all on x), x is
kept with probability min(1, p(x) / q(x)); else the token is drawn from what p has beyond q, by the inverse of its
cumulated weights: one random number a row, where an exponential race takes one for each of a vocabulary. On a CPU:
rows are read as NumPy's, whose small operations take a fraction of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

stock_parse = RejectionSampler.parse_output
# Behind a request's last token.
NO_TOKEN = -1


def verify_likeliest(logits: torch.Tensor, drafts: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each request's likeliest tokens up to the first that is not its draft; arguments and result as of `verify_drawn`.

    They are chosen by the plain sampler's operation, so that a tie is decided as without a drafter.
    """
    likeliest = Sampler.greedy_sample(logits.to(torch.float32)).tolist()
    drafted = drafts.tolist()
    tokens, first, width = [], 0, max(counts) + 1
    for number, count in enumerate(counts):
        own = likeliest[first : first + count + 1]
        given = drafted[first - number : first - number + count]
        taken = next((i for i, (a, b) in enumerate(zip(own, given, strict=False)) if a != b), count) + 1
        tokens.append(own[:taken] + [NO_TOKEN] * (width - taken))
        first += count + 1
    return torch.from_numpy(np.array(tokens, dtype=np.int32))


def verify_drawn(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    drafts: torch.Tensor,
    counts: Sequence[int],
    draft_probs: torch.Tensor | None,
) -> torch.Tensor:
    """Verify the drafts of sampled requests: tokens [batch, 1 + most drafts] int32, -1 behind a request's last.

    Args:
        logits: [drafts + batch, V], each request's drafts one after the other, and the row behind them.
        temperature: [batch], above 0.
        drafts: [drafts] int.
        counts: drafts of each request.
        draft_probs: [drafts, V] float32 that they were drawn from; None for likeliest ones.
    """
    bounds = list(pairwise(accumulate(counts, initial=0)))
    probs = None if draft_probs is None else draft_probs.numpy()
    each = torch.from_numpy(np.repeat(temperature.numpy(), np.array(counts) + 1)).unsqueeze(-1)
    chances = (logits.to(torch.float32) / each).softmax(-1).numpy()
    drafted, random = drafts.numpy(), torch.rand(len(drafts) + len(counts), dtype=torch.float64).numpy()
    places = np.arange(len(drafted))
    proposed = 1 if probs is None else probs[places, drafted]
    likely = random[: len(drafted)] * proposed < chances[places + np.repeat(np.arange(len(counts)), counts), drafted]
    kept = likely & (drafted >= 0)  # the scheduler's placeholders are no drafts

    given, accepted, width, tokens = drafted.tolist(), kept.tolist(), max(counts) + 1, []
    for request, (begin, stop) in enumerate(bounds):
        end = next((place for place in range(begin, stop) if not accepted[place]), stop)
        weights = cumulated = chances[end + request].cumsum(dtype=np.float64)
        if end < stop:
            proposal = np.eye(1, len(weights), given[end])[0] if probs is None else probs[end]
            cumulated = np.maximum(chances[end + request] - proposal, 0).cumsum(dtype=np.float64)
            cumulated = cumulated if cumulated[-1] else weights  # where rounding alone rejected it, nothing is left
        token = draw(cumulated, random[len(drafted) + request])
        tokens.append([*given[begin:end], token] + [NO_TOKEN] * (width - 1 - (end - begin)))
    return torch.tensor(tokens, dtype=torch.int32)


def parse_output(
    output_token_ids: torch.Tensor,
    vocab_size: int,
    discard_req_indices: Sequence[int] = (),
    logprobs_tensors: LogprobsTensors | None = None,
) -> tuple[list[list[int]], Any]:
    """`RejectionSampler.parse_output`: each request's tokens, none of those to discard; and their log-probabilities.

    Without these it is done on lists, as NumPy takes a few rows ten times as long.
    """
    if logprobs_tensors is not None:
        parsed: tuple[list[list[int]], Any] = stock_parse(
            output_token_ids, vocab_size, discard_req_indices, logprobs_tensors
        )
        return parsed
    rows = [[token for token in row if 0 <= token < vocab_size] for row in output_token_ids.tolist()]
    for index in discard_req_indices:
        rows[index] = []
    return rows, None


def draw(cumulated: npt.NDArray[np.float64], random: float) -> int:
    """Draw a place by cumulated weights [V], whose sum is above 0, and a random number in [0, 1).

    Weights that are no numbers, as of a broken model, give a place, too.
    """
    # Above 0 and at most the sum, so that nothing without weight is found.
    return int(np.searchsorted(cumulated, (1 - random) * cumulated[-1]))
