"""Held-out loss of a transformers Laguna under pruning masks, the pruned atoms being zeroed in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from laguna_serve.plugins.pruning import ExpertShape, Pruning

IGNORED = -100


@contextmanager
def zeroed(model: Any, shape: ExpertShape, pruning: Pruning) -> Iterator[None]:
    """Yield the model with every pruned atom's gate row, up row and down column at zero; put back at the end."""
    experts = [model.model.layers[layer].mlp.experts for layer in shape.layers]
    saved = [(e.gate_up_proj.data.clone(), e.down_proj.data.clone()) for e in experts]
    try:
        for layer, module in enumerate(experts):
            for expert in range(shape.num_experts):
                gone = pruning.indices[layer, expert][~pruning.keep[layer, expert]].reshape(-1)
                atoms = torch.from_numpy(gone)
                module.gate_up_proj.data[expert].unflatten(0, (2, -1))[:, atoms] = 0
                module.down_proj.data[expert][:, atoms] = 0
        yield
    finally:
        for module, (gate_up, down) in zip(experts, saved, strict=True):
            module.gate_up_proj.data, module.down_proj.data = gate_up, down


@torch.no_grad()
def mean_loss(model: Any, rows: list[torch.Tensor], scored: list[torch.Tensor] | None = None) -> float:
    """Mean next-token loss in nats, each predicted token counting the same.

    `scored`: which tokens of each row are predicted (TextRows); None: all but the first.
    """
    total, count = 0.0, 0
    for number, row in enumerate(rows):
        wanted = row[1:] if scored is None else row[1:].where(scored[number][1:], IGNORED)
        wanted = wanted.to(model.device)
        logits = model(input_ids=row[None].to(model.device)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED))
        count += int((wanted != IGNORED).sum())
    return total / count
