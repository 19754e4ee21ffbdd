"""When a draft is accepted, and the losses that train for it.

Write x₁ … x_γ for what the target went on to say behind an anchor, sampled at temperature T, p_k for the target's
distribution at place k (softmax of its logits ÷ T, given x₁ … x_{k−1}) and q_k for the drafter's (of its own logits
÷ T: vLLM's drafters use the temperature and no other sampling parameter).

Verification accepts a drawn draft d_k with min(1, p_k(d_k) / q_k(d_k)) and puts a token of the residual in its place
otherwise (arXiv:2211.17192), so that what is committed has the target's distribution. Turned round: given that x_k is
what was committed at place k, and that all before it were accepted, it was the draft with probability

    α_k = min(1, q_k(x_k) / p_k(x_k))           drafts drawn from q_k
    α_k = 1 if x_k is q_k's likeliest token      greedy drafts, at any temperature: q_k is all on one token
    (T = 0: p_k is all on x_k, and both are the second)

since min(p_k, q_k) ÷ p_k of the committed tokens are accepted ones. Recorded text therefore suffices to say exactly
how often drafts would have been accepted along it, and over text sampled at T the mean is that of serving at T.

Losses, each weighted exp(−(k − 1) ÷ decay) by place (DFlash, arXiv:2602.06036):

    ce        −log q_k(x_k), logits undivided
    dspark    0.1 · cross entropy of q_k under p_k + 0.9 · ½ Σ |p_k − q_k| (DSpark, arXiv:2607.05147); the second is one
              minus the chance that a drawn draft is accepted. At T = 0 p_k is all on x_k and q_k is taken at T = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from laguna_serve.scripts.checkpoints.drafters.dflash import IGNORED

Loss = Literal["ce", "dspark"]
Drafts = Literal["greedy", "probabilistic"]
CE_SHARE, VARIATION_SHARE = 0.1, 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """What a drafter says of blocks, and what followed.

    Attributes:
        logits: [B, A, γ, V'] over the drafter's vocabulary.
        labels: [B, A, γ] what followed in that vocabulary; IGNORED for a token that it lacks.
        tokens: [B, A, γ] the same in the target's vocabulary.
        known: [B, A, γ] bool, false behind the end of an answer.
        temperatures: [B] of the answers.
        target: [B, A, γ, V] the target's logits; None where nothing asks for them.
        vocabulary: [V'] which of the target's tokens are drafted; None for all.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor
    known: torch.Tensor
    temperatures: torch.Tensor
    target: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None


def find_acceptance(drafted: Drafted, drafts: Drafts) -> torch.Tensor:
    """Find α [B, A, γ], 0 behind the end of an answer."""
    greedy = (drafted.logits.argmax(-1) == drafted.labels).float()
    if drafts == "probabilistic" and drafted.target is not None:
        heat = _heat(drafted)
        own = (drafted.logits / heat[..., None]).log_softmax(-1)
        own = own.gather(-1, drafted.labels.clamp_min(0)[..., None]).squeeze(-1)
        own = own.masked_fill(drafted.labels == IGNORED, -torch.inf)
        wanted = (drafted.target / heat[..., None]).log_softmax(-1)
        wanted = wanted.gather(-1, drafted.tokens[..., None]).squeeze(-1)
        drawn = (own - wanted).clamp_max(0).exp()
        greedy = torch.where(drafted.temperatures[:, None, None] > 0, drawn, greedy)
    return greedy * drafted.known


def find_loss(drafted: Drafted, loss: Loss, weights: torch.Tensor) -> torch.Tensor:
    """Find the mean loss of a batch, places weighted by `weights` [γ]; what cannot be drafted teaches `ce` nothing."""
    if loss == "ce":
        counted = drafted.known & (drafted.labels != IGNORED)
        flat = F.cross_entropy(
            drafted.logits.flatten(0, 2), drafted.labels.flatten(), reduction="none", ignore_index=IGNORED
        )
        return _average(flat.view(counted.shape), counted, weights)
    assert drafted.target is not None
    wanted = _find_wanted(drafted)
    own = (drafted.logits / _heat(drafted)[..., None]).log_softmax(-1)
    entropy = -(wanted * own).sum(-1)
    variation = 1 - torch.minimum(wanted, own.exp()).sum(-1)
    return _average(CE_SHARE * entropy + VARIATION_SHARE * variation, drafted.known, weights)


def make_weights(gamma: int, decay: float) -> torch.Tensor:
    """Make the weights [γ] of a block's places."""
    return torch.exp(-torch.arange(gamma).float() / decay)


def count_accepted(alpha: torch.Tensor) -> torch.Tensor:
    """Count the expected accepted drafts [B, A] of α [B, A, γ]."""
    return alpha.cumprod(-1).sum(-1)


def _heat(drafted: Drafted) -> torch.Tensor:
    """Find what logits are divided by, [B, 1, 1]: the temperature, or 1 for greedy answers."""
    return torch.where(drafted.temperatures > 0, drafted.temperatures, 1.0)[:, None, None]


def _find_wanted(drafted: Drafted) -> torch.Tensor:
    """Find p [B, A, γ, V'] of the tokens that can be drafted; the others' share is missing from its sum."""
    assert drafted.target is not None
    wanted = (drafted.target / _heat(drafted)[..., None]).softmax(-1)
    if drafted.vocabulary is not None:
        wanted = wanted[..., drafted.vocabulary]
    sure = torch.zeros_like(wanted).scatter_(-1, drafted.labels.clamp_min(0)[..., None], 1.0)
    sure *= (drafted.labels != IGNORED)[..., None]
    return torch.where(drafted.temperatures[:, None, None, None] > 0, wanted, sure)


def _average(values: torch.Tensor, counted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weighted = counted * weights
    return (values * weighted).sum() / weighted.sum().clamp_min(1e-9)
