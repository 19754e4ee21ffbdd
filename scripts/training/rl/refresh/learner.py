"""A drafter that goes on learning: fp32 weights and an optimiser that last from one refresh to the next."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.training.drafter.blocks import Blocks
from laguna_serve.scripts.training.drafter.models import Made, load_warm, read_warm, write_drafter
from laguna_serve.scripts.training.drafter.objective import Loss, find_loss, make_weights
from laguna_serve.scripts.training.drafter.training import Fit, draft_as_decoding
from laguna_serve.scripts.training.rl.refresh.pushed import Pushed
from laguna_serve.serving.checkpoint import Target

# Answers of a training step, and blocks in each.
ROWS, ANCHORS = 4, 12
CLIP_NORM = 1.0


def load_drafter(folder: Path, target: Target, gamma: int | None) -> Made:
    """Load a checkpoint as fp32, for blocks of as many drafts as the engine makes: places see each other.

    Raises:
        CheckpointError: it does not fit the target, or has parts that cannot be trained here.
    """
    made = load_warm(folder, read_warm(folder, target))
    if gamma is not None:
        made.module.shape = replace(made.module.shape, block_size=gamma + 1)
    return made


class Learner:
    """The weights that learn; what is served is a copy of them in a checkpoint's own dtype."""

    def __init__(self, made: Made, loss: Loss, lr: float) -> None:
        """Begin with a drafter's weights."""
        self.made, self._lr = made, lr
        shape = made.module.shape
        # Rows and seeds are given with each refresh.
        self._fit = Fit(loss, 0, lr, ROWS, ANCHORS, shape.block_size / 2, 0, 0)
        self._weights = make_weights(shape.gamma, self._fit.decay)
        self.module: LagunaDrafter = made.module.train()
        self._optimizer = self._make_optimizer()

    def learn(self, blocks: Blocks, steps: int, rng: random.Random) -> float:
        """Take so many steps on answers under the present policy; the mean loss of the last quarter of them."""
        losses = []
        for _ in range(steps):
            chosen = [rng.randrange(len(blocks.rows)) for _ in range(self._fit.rows)]
            loss = find_loss(
                draft_as_decoding(self.module, blocks, chosen, self._fit, rng), self._fit.loss, self._weights
            )
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
            self._optimizer.step()
            losses.append(loss.item())
        last = losses[-max(1, len(losses) // 4) :]
        return sum(last) / len(last)

    def start_over(self, weights: LagunaDrafter) -> None:
        """Go back to a drafter's weights, and forget the optimiser's moments."""
        self.module.load_state_dict(weights.state_dict())
        self._optimizer = self._make_optimizer()

    def write(self, version: str, target_folder: Path, folder: Path) -> Pushed:
        """Write a checkpoint that can be served. Raises CheckpointError: the disk is full or refuses."""
        write_drafter(self.made, target_folder, folder)
        return Pushed.of(version, folder)

    def dump(self) -> dict[str, Any]:
        """Return what a run continues from."""
        return {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `dump` gave."""
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), lr=self._lr, betas=(0.9, 0.95), weight_decay=0.0)
