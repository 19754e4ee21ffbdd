"""What the student is trained to make small: an error of a block's output, a divergence from the teacher's tokens.

From a store the teacher's distribution is known on its K likeliest tokens and as the mass of all others together. Both
distributions are then taken over K + 1 outcomes, the last one being "any other token": by the data processing
inequality that KL is never more than the whole vocabulary's, and equal to it for K = V. Renormalising over the K
tokens alone, the other custom, says nothing about the mass outside, which the student is free to misplace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LagunaForCausalLM


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The teacher's distribution at P places.

    Attributes:
        ids: [P, K] int64; None of the whole vocabulary in its order.
        logprobs: [P, K] fp32, nats.
        tail: [P] fp32, the log of the mass of all other tokens; −inf where there is none.
    """

    ids: torch.Tensor | None
    logprobs: torch.Tensor
    tail: torch.Tensor

    def at(self, chosen: slice) -> Top:
        """Return that of some of the places."""
        return Top(None if self.ids is None else self.ids[chosen], self.logprobs[chosen], self.tail[chosen])

    def entropy(self) -> torch.Tensor:
        """Return the entropy [P] in nats, with all other tokens as one outcome."""
        every = torch.cat([self.logprobs, self.tail[:, None]], -1)
        return -torch.where(every.isfinite(), every.exp() * every, 0.0).sum(-1)

    def to(self, device: torch.device) -> Top:
        """Move to a device."""
        ids = None if self.ids is None else self.ids.to(device)
        return Top(ids, self.logprobs.to(device), self.tail.to(device))


def find_top(logits: torch.Tensor, k: int) -> Top:
    """Find the K likeliest tokens of logits [P, V], likeliest first, and the mass of the others; K = V keeps all."""
    logprobs = logits.float().log_softmax(-1)
    if k >= logits.shape[-1]:
        return Top(None, logprobs, torch.full(logprobs.shape[:1], -torch.inf, device=logits.device))
    best = logprobs.topk(k, dim=-1)
    return Top(best.indices, best.values, logprobs.scatter(-1, best.indices, -torch.inf).logsumexp(-1))


def sum_lumped_kl(logits: torch.Tensor, top: Top) -> torch.Tensor:
    """Sum over places of KL(teacher ‖ student), nats, on the K tokens and all others as one; logits [P, V]."""
    got = logits.float().log_softmax(-1)
    if top.ids is None:
        return F.kl_div(got, top.logprobs, reduction="sum", log_target=True)
    on_top = F.kl_div(got.gather(-1, top.ids), top.logprobs, reduction="sum", log_target=True)
    rest = got.scatter(-1, top.ids, -torch.inf).logsumexp(-1)
    there = top.tail.isfinite()
    return on_top + F.kl_div(rest[there], top.tail[there], reduction="sum", log_target=True)


def sum_over_places(student: LagunaForCausalLM, hidden: torch.Tensor, top: Top, chunk: int) -> torch.Tensor:
    """Sum the lumped KL over hidden states [P, H] in front of the head.

    `chunk` places at a time (0: all), whose logits are made again in the backward pass: [chunk, V] exists, not [P, V].
    """
    if not chunk or len(hidden) <= chunk:
        return sum_lumped_kl(student.lm_head(hidden), top)

    def part(states: torch.Tensor, start: int) -> torch.Tensor:
        return sum_lumped_kl(student.lm_head(states), top.at(slice(start, start + chunk)))

    again: Callable[..., torch.Tensor] = checkpoint
    parts = [again(part, states, n * chunk, use_reentrant=False) for n, states in enumerate(hidden.split(chunk))]
    return torch.stack(parts).sum()


def normalised_error(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """‖got − wanted‖² / ‖wanted‖² over all tokens of a batch."""
    return (got - wanted).square().sum() / wanted.square().sum()


def divergence(
    teacher: LagunaForCausalLM, student: LagunaForCausalLM, ids: torch.Tensor, spoken: torch.Tensor
) -> torch.Tensor:
    """Mean forward KL(teacher ‖ student), nats, where the next token is marked in `spoken`; both [rows, length].

    A batch in which the assistant says nothing (rows shorter than the questions) has 0.
    """
    predicted = spoken[:, 1:]
    wanted = read_top(teacher, ids, predicted, teacher.config.vocab_size)
    hidden = student.model(input_ids=ids).last_hidden_state[:, :-1][predicted]
    return sum_over_places(student, hidden, wanted, 0) / max(1, len(hidden))


@torch.no_grad()
def read_top(teacher: LagunaForCausalLM, ids: torch.Tensor, predicted: torch.Tensor, k: int) -> Top:
    """Ask a teacher in memory: its K likeliest next tokens of rows [R, L] where `predicted` [R, L − 1] says so."""
    hidden = teacher.model(input_ids=ids).last_hidden_state[:, :-1][predicted]
    return find_top(teacher.lm_head(hidden), k)
