"""How likely committed tokens were, by the logits of the step that committed them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A committed token's, in nats, of the state that it was committed in.

    Attributes:
        value: its log-probability, which is also the confidence by which its position was chosen.
        top: the likeliest ids that may be chosen, with theirs, the likeliest first; of equal ones the lowest id.
    """

    value: float
    top: tuple[tuple[int, float], ...] = ()


def read_likelihoods(
    canvas: Canvas, before: State, after: State, logits: torch.Tensor, most: int
) -> dict[int, Likelihood]:
    """Read those of what a step committed: position → its token's.

    Args:
        canvas: of both states.
        before: the state that the step left.
        after: the one that it came to.
        logits: [block_length, vocabulary] fp32 of the open block, computed for the state before.
        most: so many of the likeliest are listed.
    """
    block = canvas.find_block(before)
    assert block is not None
    committed = [at for at in block if before[at] != after[at]]
    rows = torch.log_softmax(logits[[at - block.start for at in committed]], -1)
    values = [row[after[at]].item() for at, row in zip(committed, rows, strict=True)]
    rows[:, canvas.mask_id] = -torch.inf  # which is never chosen
    ordered, ids = torch.sort(rows, dim=-1, descending=True, stable=True)
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(ids[:, :most].tolist(), ordered[:, :most].tolist(), strict=True)
    ]
    return {at: Likelihood(value, top) for at, value, top in zip(committed, values, tops, strict=True)}
