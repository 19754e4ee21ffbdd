"""DANTE's losses and schedules, as pure functions.

    L(θ; t) = λ_CE(t) · L_CWCE(θ) + λ_TEA(t) · L_TEA(θ)
    L_CWCE  = (1/N) Σᵢ w(Hᵢ) · CEᵢ,   w(H) = 0.30 + 0.70 / (1 + exp(1.5 · (H − 1.5)))
    L_TEA   = ‖E(θ) − E(θ₀)‖²_F                                    as printed ("sum"), or over ‖E(θ₀)‖²_F ("relative")
    λ_CE    = min(1, 0.70 + 0.30 · max(0, t − warm-up) / (T − warm-up))
    λ_TEA   = 1 − 0.9 · t / T

CEᵢ is the mean over an answer's own tokens, so that long answers weigh no more than short ones. The page's formulas
have lost their minus signs; the published T is 2000, its warm-up 200.

Source: OdaxAI/DANTE-Mosaic-3.5B's model card.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Anchor = Literal["relative", "sum", "none"]
IGNORED = -100
FLOOR, SLOPE, CENTER = 0.30, 1.5, 1.5
CE_START = 0.70
TEA_END = 0.1


def confidence_weight(entropy: torch.Tensor, center: float = CENTER) -> torch.Tensor:
    """Return w(H) of entropies in nats, of the same shape: between `FLOOR` and 1, falling."""
    return FLOOR + (1 - FLOOR) * torch.sigmoid(-SLOPE * (entropy - center))


def sequence_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each sequence's mean cross entropy [B] in nats over its labelled tokens; 0 where none is.

    Args:
        logits: [B, T, V]; position t predicts the token at t + 1.
        labels: [B, T] int64, `IGNORED` where nothing is to be learned.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    counts = (targets != IGNORED).sum(1)
    return losses.sum(1) / counts.clamp(min=1)


def weighted_cross_entropy(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return (1/N) Σ w · CE over sequences' losses [N] and their weights [N]: not normalised by the weights."""
    return (weights * losses).mean()


def embedding_drift(current: torch.Tensor, initial: torch.Tensor, anchor: Anchor = "relative") -> torch.Tensor:
    """Return how far the embedding [V, d] has moved from its initialisation: the squared Frobenius norm.

    relative: over the initialisation's own, so that one number means the same at every size; sum: as printed.
    """
    if anchor == "none":
        return current.new_zeros((), dtype=torch.float32)
    moved = (current.float() - initial.float()).square().sum()
    return moved if anchor == "sum" else moved / initial.float().square().sum()


def schedule_ce(step: int, steps: int, warm_up: int) -> float:
    """Return λ_CE before a step, counted from 0: held in the warm-up, then linear to 1, and no further."""
    if steps <= warm_up:
        return CE_START
    return min(1.0, CE_START + (1 - CE_START) * max(0, step - warm_up) / (steps - warm_up))


def schedule_tea(step: int, steps: int) -> float:
    """Return λ_TEA before a step, counted from 0: linear from 1 to `TEA_END`, and no lower."""
    return max(TEA_END, 1 - (1 - TEA_END) * step / steps)
