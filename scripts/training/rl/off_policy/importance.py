"""What a sampled token counts where trainer and engine disagree about it: truncated importance sampling.

The engine samples from its own distribution, the trainer's gradient is of another: rounding, kernels, a lower precision
and a router's ties lie between them. Each token is weighted by trainer's ÷ engine's probability, as importance
sampling asks, but by no more than a cap, so that one unlikely token does not outweigh all others (Ionides 2008; for
rollouts Yao et al. 2025, fengyao.notion.site/off-policy-rl, whose C = 2 is the usual default). Completions that the
trainer finds far likelier or less likely as a whole, by the geometric mean of the ratios, can be left out
(Liu et al. 2025, "When Speed Kills Stability").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Correction:
    """`cap`: the most that a token weighs; `bound`: completions whose mean ratio is beyond bound or 1 ÷ bound go."""

    cap: float = math.inf
    bound: float | None = None


def weigh_tokens(trainer: torch.Tensor, engine: torch.Tensor, cap: float) -> torch.Tensor:
    """min(trainer's ÷ engine's probability, cap) of every token, from log-probabilities in nats; no gradient."""
    return (trainer.detach() - engine).exp().clamp(max=cap)


def keep_completions(
    trainer: torch.Tensor, engine: torch.Tensor, sampled: torch.Tensor, bound: float | None
) -> torch.Tensor:
    """Whether the geometric mean of the ratios over the sampled tokens is within [1 ÷ bound, bound].

    All [B, T] → [B] bool.
    """
    apart = torch.where(sampled, trainer.detach() - engine, 0).sum(1) / sampled.sum(1).clamp(min=1)
    return apart.abs() <= (math.inf if bound is None else math.log(bound))
