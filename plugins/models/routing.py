"""Laguna's router: which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch


def route(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid scores; the bias takes part in the selection and not in the weights.

    logits [T, E], soft-capped already; bias [E] fp32.  Returns weights [T, topk] fp32 and expert ids [T, topk] int32.

    Source: `LagunaTopKRouter` in transformers' modular_laguna.py.
    """
    scores = logits.float().sigmoid()
    ids = torch.topk(scores + bias, topk, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)
