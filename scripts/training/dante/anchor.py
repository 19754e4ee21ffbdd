"""TEA: a student's embedding, held to its initialisation, whole or shared out among processes.

The term is a sum over the embedding's entries, and so is its gradient: it is added to what the backward pass has left,
by each process to its own part. FSDP2 has the weight in parts then, as DTensors, and gathers nothing for it.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from laguna_serve.scripts.training.dante.losses import Anchor, embedding_drift
from laguna_serve.serving.kit.errors import CommandError


def check_sharing(kind: str, *, is_fsdp2: bool) -> None:
    """Raise CommandError where processes share a model out in a way that leaves no weight in parts.

    Args:
        kind: Accelerate's name of it.
        is_fsdp2: FSDP with version 2.
    """
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") and not is_fsdp2:
        got = "FSDP 1" if kind == "FSDP" else kind
        remedy = "launch with --multi_gpu, or with --use_fsdp --fsdp_version 2"
        raise CommandError(f"accelerate: expected DDP or FSDP 2, got {got}; {remedy}")


class EmbeddingAnchor:
    """The initial embedding [V, d]."""

    def __init__(self, weight: torch.Tensor, kind: Anchor) -> None:
        """Copy `weight`, as the first process has it."""
        self._initial, self._kind = weight.detach().clone(), kind

    def measure(self, weight: torch.Tensor) -> torch.Tensor:
        """Return how far it has moved, over the initialisation's norm: the same scalar to every process."""
        return self._sum_up(weight, "relative")

    def pull(self, weight: torch.nn.Parameter, factor: float) -> torch.Tensor:
        """Add the gradient of factor · L_TEA to the weight's, and return the term, a scalar to every process.

        To be called once per step, when the loss's own gradient has been reduced.
        """
        if self._kind != "none":
            assert weight.grad is not None
            scale = factor if self._kind == "sum" else factor / self._sum_up(torch.zeros_like(weight), "sum")
            weight.grad.add_((weight.detach() - self._place(weight)) * (2 * scale))
        return factor * self._sum_up(weight, self._kind)

    def _sum_up(self, weight: torch.Tensor, kind: Anchor) -> torch.Tensor:
        drift = embedding_drift(weight.detach(), self._place(weight), kind)
        return drift.full_tensor() if isinstance(drift, DTensor) else drift

    def _place(self, weight: torch.Tensor) -> torch.Tensor:
        """Put the initial embedding where the weight is; of a weight in parts every process has its own."""
        if isinstance(weight, DTensor) and not isinstance(self._initial, DTensor):
            self._initial = distribute_tensor(self._initial.to(weight.device), weight.device_mesh, weight.placements)
        elif self._initial.device != weight.device:
            self._initial = self._initial.to(weight.device)
        return self._initial
