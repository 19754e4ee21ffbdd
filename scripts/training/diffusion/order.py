"""Train an order model on a target's own decodes.

The decodes are the reference's, step by step. From each step's logits the model learns to tell the next commits, as
far as proposals reach, within the block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.proposing.order import OrderModel, Outlook
from laguna_serve.plugins.diffusion.proposing.shapes import pace
from laguna_serve.plugins.diffusion.speculation import Decoder
from laguna_serve.scripts.training.loop import Schedule, train

DEPTH = 4
BATCH = 128
SCHEDULE = Schedule(steps=600, peak_lr=3e-3, weight_decay=0.01)


@dataclass(frozen=True, slots=True)
class Examples:
    """States described by earlier logits, and what the reference commits next; N of them, blocks of L positions.

    Attributes:
        features: [N, L, FEATURES].
        tokens: [N, L] int64, the committed ones and those that the logits choose.
        open: [N, L] bool.
        next: [N, L] bool, what is committed.
        right: [N, L] bool, those of them whose token the logits chose.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    open: torch.Tensor
    next: torch.Tensor
    right: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def record(decoder: Decoder, canvases: Iterable[Canvas]) -> Examples:
    """Decode canvases of one block length step by step, and describe what each step's logits say of the next ones."""
    assert decoder.speculation is None, "every state of the reference has to be seen"
    rows: list[tuple[torch.Tensor, ...]] = []
    for canvas in canvases:
        run = decoder.begin(canvas)
        outlooks: list[Outlook] = []
        while run.find_end() is None:
            before, block = run.state, canvas.find_block(run.state)
            assert block is not None
            outlooks = [at for at in outlooks if at.block == block][-DEPTH:]
            decoder.advance([run])
            rows += [_describe(outlook, before, run.state) for outlook in outlooks]
            if run.find_stale() is not None:
                outlooks.append(Outlook(run, pace(run.reference)))
    return Examples(*(torch.stack(part) for part in zip(*rows, strict=True)))


def _describe(outlook: Outlook, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Describe a state by an outlook of before it, and the step that leaves it."""
    ranking = outlook.rank_open(before)
    features, tokens = outlook.describe(before, ranking)
    block = outlook.block
    mask_id = outlook.run.canvas.mask_id
    open_, committed, right = (
        torch.tensor(values, device=tokens.device)
        for values in (
            [before[at] == mask_id for at in block],
            [before[at] != after[at] for at in block],
            [before[at] != after[at] == int(tokens[at - block.start]) for at in block],
        )
    )
    return features, tokens, open_, committed, right


def train_order(
    model: OrderModel, examples: Examples, schedule: Schedule, seed: int, state: Path
) -> list[dict[str, float]]:
    """Train in place on one thread: cross entropy of the next position, and of whether its token stays; the log."""

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        at = torch.randint(len(examples), (BATCH,), generator=draw)
        is_next, is_right = model(examples.features[at], examples.tokens[at])
        logits = is_next.masked_fill(~examples.open[at], -torch.inf)
        committed = examples.next[at]
        share = committed / committed.sum(-1, keepdim=True)
        order = -(torch.log_softmax(logits, -1).masked_fill(~committed, 0) * share).sum(-1).mean()
        right = F.binary_cross_entropy_with_logits(is_right[committed], examples.right[at][committed].float())
        hit = committed.gather(1, logits.argmax(-1, keepdim=True)).float().mean()
        return order + right, {"order": order.item(), "right": right.item(), "hit": hit.item()}

    model.train().requires_grad_(True)
    log = train("order", model, schedule, loss_of_step, state, threads=1)
    model.eval().requires_grad_(False)
    return log
