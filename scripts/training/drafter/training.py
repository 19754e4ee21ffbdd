"""Training on recorded answers: which places are drafted at, and the step that is repeated.

A batch is a function of seed, step and the weights at that step, so that an interrupted run goes on to the same bits.

Where blocks stand decides what is learned. In decoding a block stands behind the last token that a step committed:
more often after a token that was hard to draft than after an easy one, which was passed over with its block. So places
are drawn evenly over an answer, drafted at without gradients, and moved on by what would have been accepted and the
target's own token behind it: one step of decoding with the drafter as it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.training.drafter.blocks import Blocks
from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.drafter.objective import (
    Drafted,
    Drafts,
    Loss,
    count_accepted,
    find_acceptance,
    find_loss,
    make_weights,
)
from laguna_serve.scripts.training.loop import Schedule, train


@dataclass(frozen=True, slots=True)
class Fit:
    """How a drafter is trained: `rows` answers a step, `anchors` blocks in each, `decay` places of the weights."""

    loss: Loss
    steps: int
    lr: float
    rows: int
    anchors: int
    decay: float
    seed: int
    threads: int
    weight_decay: float = 0.01


def fit_drafter(drafter: LagunaDrafter, blocks: Blocks, fit: Fit, state_file: Path) -> list[dict[str, float]]:
    """Train in place; returns the log: step, loss, and τ of greedy drafts at the places that were trained on."""
    weights = make_weights(drafter.shape.gamma, fit.decay).to(blocks.shared.device)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"{fit.seed}/{step}")
        chosen = [rng.randrange(len(blocks.rows)) for _ in range(fit.rows)]
        drafted = draft_as_decoding(drafter, blocks, chosen, fit, rng)
        loss = find_loss(drafted, fit.loss, weights)
        with torch.no_grad():
            tau = 1 + float(count_accepted(find_acceptance(drafted, "greedy")).mean())
        return loss, {"tau": tau}

    schedule = Schedule(fit.steps, fit.lr, fit.weight_decay)
    return train("drafter", drafter, schedule, loss_of_step, state_file, threads=fit.threads)


def draft_as_decoding(
    drafter: LagunaDrafter, blocks: Blocks, chosen: Sequence[int], fit: Fit, rng: random.Random
) -> Drafted:
    """Draft in the chosen rows, behind anchors that stand where decoding would have them, for the loss of a step."""
    drafts: Drafts = "greedy" if fit.loss == "ce" else "probabilistic"
    anchors = draw_anchors([blocks.rows[row] for row in chosen], fit.anchors, rng)
    batch = blocks.open(chosen)
    with torch.no_grad():
        alpha = find_acceptance(batch.draft(drafter, anchors, target=fit.loss != "ce"), drafts).cpu()
    anchors = move_on(anchors, alpha, batch.lengths, torch.Generator().manual_seed(rng.getrandbits(48)))
    return batch.draft(drafter, anchors, target=fit.loss != "ce")


def draw_anchors(rows: Sequence[Row], count: int, rng: random.Random) -> torch.Tensor:
    """Draw positions [B, count] evenly over what was emitted in each row, but for its last token."""
    return torch.tensor([[rng.randint(row.start, len(row.tokens) - 2) for _ in range(count)] for row in rows])


def move_on(
    anchors: torch.Tensor, alpha: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Move anchors [B, A] by one step of decoding, in which place k is accepted with α [B, A, γ].

    One that would pass the last token but one stays where it is.
    """
    kept = (torch.rand(alpha.shape, generator=generator) < alpha).long()
    moved = anchors + kept.cumprod(-1).sum(-1) + 1
    return torch.where(moved <= lengths[:, None] - 2, moved, anchors)
