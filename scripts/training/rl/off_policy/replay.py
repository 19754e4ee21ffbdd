"""The engine's choice of experts in the trainer's forward pass: rollout routing replay (R3, arXiv:2510.11370).

Trainer and engine round differently, and where two experts score alike a router may choose differently on either side,
which is no rounding any more. With the choices that the engine returned in its answers the trainer computes the same
function: each router's scores are its own, gathered at the engine's ids and normalised over them, so that gradients
flow through them as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import LagunaForCausalLM
from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

UNKNOWN = -1  # where nothing was recorded: padding


@dataclass(slots=True)
class Replay:
    """`rerouted` [tokens] bool: in some layer the trainer would have chosen otherwise; None before a forward pass."""

    rerouted: torch.Tensor | None = None

    def choose(
        self, recorded: torch.Tensor, router: nn.Module, _: object, chosen: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Replace a router's choice by the recorded experts [tokens, top_k]."""
        assert isinstance(router, LagunaTopKRouter)
        logits, weights, own = chosen
        known = (recorded != UNKNOWN).all(-1, keepdim=True)
        experts = torch.where(known, recorded, own)
        differs = (experts.sort(-1).values != own.sort(-1).values).any(-1)
        self.rerouted = differs if self.rerouted is None else self.rerouted | differs
        scores = torch.sigmoid(logits).gather(-1, experts)
        return logits, (scores / scores.sum(-1, keepdim=True)).to(weights.dtype), experts


@contextmanager
def replay_experts(model: LagunaForCausalLM, experts: torch.Tensor | None) -> Iterator[Replay]:
    """Route one forward pass over tokens [B, T] as recorded: experts [B, T, layers, top_k] int64; None: by itself.

    Raises:
        ValueError: they are of another model.
    """
    replay = Replay()
    hooks = []
    if experts is not None:
        layers = model.model.layers
        wanted = [len(layers), model.config.num_experts_per_tok]
        if list(experts.shape[2:]) != wanted:
            raise ValueError(f"routed experts: expected [layers, top_k] {wanted}, got {list(experts.shape[2:])}")
        for number, layer in enumerate(layers):
            router = getattr(layer.mlp, "gate", None)
            if isinstance(router, LagunaTopKRouter):
                recorded = experts[:, :, number].flatten(0, 1)
                hooks.append(router.register_forward_hook(partial(replay.choose, recorded)))
    try:
        yield replay
    finally:
        for hook in hooks:
            hook.remove()
