"""Drafts verified by few operations, where requests ask for nothing but greedy tokens, or nothing but a temperature.

Beside a temperature vLLM prepares every row for every parameter, draws a replacement for each draft and a token behind
them, and has a kernel choose among them: some hundred small operations on a CPU.  Of a request's rows one alone is
drawn from in the end, that of its first rejected draft, or the one behind its last.  Which one it is depends on the
drafts' own chances alone, so that it is found first (arXiv:2211.17192, algorithm 1).

With p the target's distribution at a row and q what its draft x was drawn from (for likeliest drafts all on x), x is
kept with probability min(1, p(x) / q(x)); else the token is drawn from what p has beyond q.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from vllm.v1.sample.sampler import Sampler

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
    return torch.tensor(tokens, dtype=torch.int32)


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
    rows = [place + request for request, places in enumerate(_split(counts)) for place in places]
    each = temperature.repeat_interleave(torch.tensor(counts) + 1).unsqueeze(-1)
    chances = (logits.to(torch.float32) / each).softmax(-1)
    drafted = drafts.to(torch.int64)
    ratio = chances[torch.tensor(rows), drafted]
    if draft_probs is not None:
        ratio = ratio / draft_probs.gather(1, drafted.unsqueeze(1)).squeeze(1)
    kept = (torch.rand_like(ratio) < ratio).tolist()

    tokens, last, rejected = _keep(drafted.tolist(), kept, counts)
    found = chances[torch.tensor(last)]
    if rejected:
        requests, places = (torch.tensor(column) for column in zip(*rejected, strict=True))
        own = found[requests]
        if draft_probs is None:
            rest = own.scatter(1, drafted[places].unsqueeze(1), 0.0)
        else:
            rest = (own - draft_probs[places]).clamp_(min=0.0)
        # Nothing is left where rounding alone rejected a draft.
        found[requests] = torch.where(rest.any(-1, keepdim=True), rest, own)
    ends = draw(found).tolist()
    width = max(counts) + 1
    for row, end in zip(tokens, ends, strict=True):
        row.append(end)
        row += [NO_TOKEN] * (width - len(row))
    return torch.tensor(tokens, dtype=torch.int32)


def draw(weights: torch.Tensor) -> torch.Tensor:
    """Draw a column of each row by its weight: [rows, V] float32, with a sum above 0 → [rows] int64.

    By the inverse of the cumulated weights, exact to 2⁻²⁴ of their sum: one random number a row, where an exponential
    race takes one for each column, which at a vocabulary of 100,352 are 1.5 ms on a CPU.
    """
    cumulated = weights.cumsum(-1)
    # Above 0 and at most the sum, so that nothing without weight is found.
    threshold = (1 - torch.rand(len(weights), 1, device=weights.device)) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, threshold).squeeze(1)


def _split(counts: Sequence[int]) -> list[range]:
    """List where each request's drafts are among all."""
    return [range(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]


def _keep(
    drafts: Sequence[int], kept: Sequence[bool], counts: Sequence[int]
) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """Keep each request's drafts up to its first rejected one.

    Returns the tokens, the row that each request's next token is drawn from, and (request, draft) of those rejected.
    """
    tokens, last, rejected = [], [], []
    for request, places in enumerate(_split(counts)):
        end = next((place for place in places if not kept[place]), places.stop)
        tokens.append(list(drafts[places.start : end]))
        last.append(end + request)
        if end < places.stop:
            rejected.append((request, end))
    return tokens, last, rejected
