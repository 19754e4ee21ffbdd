"""What a dense block starts as: experts of its sparse block, concatenated.

A SwiGLU's units are independent, so the concatenation of experts computes the sum of their outputs; what is left to
choose is which experts, and what each one's share of the sum is.

| | ranked by | a chosen expert's share |
|--|--|--|
| usage | how often the router chose it | how often, of all choices |
| weight | routed weight, summed over tokens | its mean routed weight over all tokens |
| concat | routed weight, summed over tokens | 1/k: as if every token went to the k chosen ones alike |
| random | – | no expert: the shared one, and random units |

All shares are times the routed scaling factor. The shared expert always comes first, unscaled.

Source: score, select, concatenate, scale and distil is the frame of arXiv:2605.28207, of which these are simple
members: two scores and three scalings; its diversity-aware score is not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import LagunaConfig, LagunaForCausalLM
from transformers.models.laguna.modeling_laguna import LagunaMLP

from laguna_serve.scripts.training.dense.student import PROJECTIONS, fill_block

Init = Literal["usage", "weight", "concat", "random"]


@dataclass(slots=True)
class Usage:
    """How a router chose among E experts on some text.

    Attributes:
        counts: [E], how often each was chosen.
        weights: [E], the sum of what it was weighed with, before the scaling factor.
        tokens: that were routed.
    """

    counts: torch.Tensor
    weights: torch.Tensor
    tokens: int = 0

    @classmethod
    def of(cls, experts: int) -> Usage:
        """Begin with nothing routed."""
        return cls(torch.zeros(experts), torch.zeros(experts, dtype=torch.float64))

    def watch(self, router: nn.Module) -> Any:
        """Count what a router chooses from now on; returns the hook's handle."""
        return router.register_forward_hook(self._count)

    def _count(self, _router: nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        weights, chosen = output[1].double().flatten().cpu(), output[2].flatten().cpu()
        self.counts += torch.bincount(chosen, minlength=len(self.counts))
        self.weights.index_add_(0, chosen, weights)
        self.tokens += len(output[2])


@dataclass(slots=True)
class Watch:
    """Counts what the routers of several layers choose, until it is closed."""

    usage: dict[int, Usage] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def add(self, layer: int, router: nn.Module, experts: int) -> None:
        """Count this layer's router, too."""
        self.usage[layer] = Usage.of(experts)
        self.handles.append(self.usage[layer].watch(router))

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()


def choose_experts(usage: Usage, count: int, init: Init) -> list[tuple[int, float]]:
    """Choose the experts that a block starts as, best first, each with its share of the routed output."""
    if init == "random":
        return []
    score = usage.counts if init == "usage" else usage.weights
    shares: dict[Init, Callable[[int], float]] = {
        "usage": lambda expert: float(usage.counts[expert] / usage.counts.sum()),
        "weight": lambda expert: float(usage.weights[expert] / max(1, usage.tokens)),
        "concat": lambda _expert: 1 / count,
    }
    return [(expert, shares[init](expert)) for expert in score.argsort(descending=True, stable=True)[:count].tolist()]


@torch.no_grad()
def start_block(config: LagunaConfig, moe: Any, width: int, usage: Usage, init: Init, seed: int) -> LagunaMLP:
    """Make a layer's dense block, fp32, cut or filled up with random units (of `seed`) to the width."""
    parts = [tuple(getattr(moe.shared_experts, name).weight.float() for name in PROJECTIONS)]
    for expert, share in choose_experts(usage, config.num_experts_per_tok, init):
        gate, up = moe.experts.gate_up_proj[expert].float().chunk(2)
        down = moe.experts.down_proj[expert].float() * (share * config.moe_routed_scaling_factor)
        parts.append((gate, up, down))
    gate, up, down = (torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (0, 0, 1), strict=True))
    block = LagunaMLP(config, width)
    fill_block(block, gate, up, down, seed)
    return block


def start_blocks(
    teacher: LagunaForCausalLM, widths: list[int], usage: dict[int, Usage], init: Init = "usage"
) -> nn.ModuleDict:
    """Layer number → its dense block before training, for every layer that the teacher has sparse."""
    layers = teacher.model.layers
    return nn.ModuleDict(
        {str(n): start_block(teacher.config, layers[n].mlp, widths[n], used, init, n) for n, used in usage.items()}
    )
