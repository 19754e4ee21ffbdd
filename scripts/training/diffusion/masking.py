"""Masked rows to learn from and to be measured on: which positions are masked, and the loss there.

Half of a batch's rows are masked all over; of the others a part from some place on, as an answer is behind its prompt,
which is what a decode sees. A row counts the same whatever its ratio.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from laguna_serve.plugins.diffusion.model import Llada


def draw_masks(shape: tuple[int, int], ratios: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the masked positions [B, n] bool: of row i each with the chance ratios[i], at least one.

    Rows with an odd number are masked in their last part alone, from a place in the first three quarters on.
    """
    B, n = shape
    draws = torch.rand(shape, generator=generator)
    starts = torch.randint(0, max(1, n * 3 // 4), (B, 1), generator=generator)
    starts[::2] = 0
    open_to = torch.arange(n) >= starts
    masks = open_to & (draws < ratios[:, None])
    masks[torch.arange(B), torch.where(open_to, draws, 2.0).argmin(-1)] = True
    return masks


def mask_rows(ids: torch.Tensor, masks: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Put the mask's id on the masked positions of ids [B, n]."""
    return torch.where(masks, mask_id, ids)


def masked_loss(model: Llada, ids: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of the masked tokens: the mean over rows of each row's mean."""
    logits = model(mask_rows(ids, masks, model.config.mask_token_id), masks)
    losses = F.cross_entropy(logits, ids[masks], reduction="none")
    counts = masks.sum(-1)
    return (losses / counts.repeat_interleave(counts)).sum() / len(ids)
