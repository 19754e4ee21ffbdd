"""How far trainer and engine are apart on the tokens that were sampled, and where that is a router's doing.

The two round differently, in fp32 by some 1e-5 nats. Where a router's last chosen expert and the next one score the
same up to rounding, the two sides may choose differently; from that token on they are visibly apart, by 1e-4 to some
tenths of a nat, unless the trainer replays the engine's choices (replay.py). Such tokens are counted apart: what
differs elsewhere is no rounding, but other weights, or a bug; and where choices are replayed nothing may differ here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LagunaForCausalLM
from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

from laguna_serve.scripts.training.rl.policy import RolloutBatch

# Between two experts' scores, which are of order one. Choices have been seen to differ at up to 6e-7.
TIE = 1e-5


@dataclass(slots=True)
class TrainerMismatch:
    """Largest |difference| (nats) over the sampled tokens.

    The same over those that a tie is at or before, and how many those are; the mean over all.
    """

    nats: float = 0.0
    tied_nats: float = 0.0
    tied_tokens: int = 0
    _tokens: int = 0
    _sum: float = 0.0

    @property
    def mean(self) -> float:
        """Mean |difference| over all sampled tokens, in nats."""
        return self._sum / max(self._tokens, 1)

    def add(self, logprobs: torch.Tensor, batch: RolloutBatch, tied: torch.Tensor) -> None:
        """Count a batch: the trainer's log-probabilities and where a tie is at or before, both [B, L − 1]."""
        apart = (logprobs.detach() - batch.behaviour).abs()
        behind = batch.sampled & tied
        self.nats = max(self.nats, _find_largest(apart[batch.sampled & ~tied]))
        self.tied_nats = max(self.tied_nats, _find_largest(apart[behind]))
        self.tied_tokens += int(behind.sum())
        self._tokens += int(batch.sampled.sum())
        self._sum += float(apart[batch.sampled].sum())


def _find_largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


@dataclass(slots=True)
class Routers:
    """What the routers of a model have left to chance while they were watched."""

    _closest: list[torch.Tensor] = field(default_factory=list)

    def find_tied(self, batch: RolloutBatch) -> torch.Tensor:
        """Find, in the forward pass that was watched, whether a tie is at or before a token: [B, L − 1] bool."""
        shape = batch.sampled.shape
        tied = torch.zeros(shape, dtype=torch.bool)
        for closest in self._closest:
            tied |= closest.view(shape) < TIE
        return tied.cummax(dim=1).values

    def note(self, router: nn.Module, _: object, chosen: tuple[torch.Tensor, ...]) -> None:
        """Note a router's choices for B × (L − 1) tokens: how close each was."""
        assert isinstance(router, LagunaTopKRouter)
        scores = torch.sigmoid(chosen[0].detach()) + router.e_score_correction_bias
        best = scores.topk(router.top_k + 1, dim=-1).values
        self._closest.append(best[:, -2] - best[:, -1])


@contextmanager
def watch_routers(model: LagunaForCausalLM) -> Iterator[Routers]:
    """Note the closest choices of every router during one forward pass."""
    routers = Routers()
    hooks = [m.register_forward_hook(routers.note) for m in model.modules() if isinstance(m, LagunaTopKRouter)]
    try:
        yield routers
    finally:
        for hook in hooks:
            hook.remove()
