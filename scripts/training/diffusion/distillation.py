"""Teach a pruned LLaDA what its teacher chooses at masked positions, and measure what that is worth.

    loss = 0.5 · CE(student, the teacher's likeliest token) + 0.3 · KL over the teacher's 32 likeliest tokens
         + 0.2 · (the student's largest probability − the teacher's)²

The model card writes KL(student ‖ teacher); the usual distillation is KL(teacher ‖ student). `direction` says which.

Agreement of the likeliest tokens is what the card reports. What decides whether a draft pays is another figure, which
`plugins/diffusion/calibration.py` counts.

Source: jaygala223/llada-distilled-24L-v3's model card, for loss and mask ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.scripts.training.diffusion.masking import draw_masks, mask_rows
from laguna_serve.scripts.training.loop import Schedule, train

Direction = Literal["student-teacher", "teacher-student"]
WEIGHTS = (0.5, 0.3, 0.2)
LIKELIEST = 32
RATIO_RANGE = (0.15, 0.85)
CONFIDENT = 0.9


class Batches(Protocol):
    """Rows to learn from."""

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """Rows [B, n] int64 for a seed and a step."""


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, direction: Direction) -> torch.Tensor:
    """Mean loss of masked positions, both logits [positions, vocabulary] fp32; the teacher's without a gradient."""
    top = teacher.topk(min(LIKELIEST, teacher.shape[-1]), dim=-1)
    chosen = F.cross_entropy(student, top.indices[:, 0])
    wanted, got = top.values.log_softmax(-1), student.gather(-1, top.indices).log_softmax(-1)
    first, second = (got, wanted) if direction == "student-teacher" else (wanted, got)
    divergence = (first.exp() * (first - second)).sum(-1).mean()
    error = F.mse_loss(student.softmax(-1).amax(-1), teacher.softmax(-1).amax(-1))
    return WEIGHTS[0] * chosen + WEIGHTS[1] * divergence + WEIGHTS[2] * error


def draw_ratios(count: int, generator: torch.Generator) -> torch.Tensor:
    """Mask ratios [count], Beta(2, 2) within `RATIO_RANGE`: the median of three even draws is one."""
    return torch.rand(count, 3, generator=generator).median(-1).values.clamp(*RATIO_RANGE)


def distil(
    teacher: Llada,
    student: Llada,
    rows: Batches,
    schedule: Schedule,
    seed: int,
    direction: Direction,
    state: Path,
    threads: int,
) -> list[dict[str, float]]:
    """Train the student in place; returns the log."""
    mask_id = teacher.config.mask_token_id

    def loss_of_step(step_number: int) -> tuple[torch.Tensor, dict[str, float]]:
        ids = rows.batch(seed, step_number)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step_number)
        masks = draw_masks((len(ids), ids.shape[1]), draw_ratios(len(ids), generator), generator).to(ids.device)
        masked = mask_rows(ids, masks, mask_id)
        with torch.no_grad():
            wanted = teacher(masked, masks)
        got = student(masked, masks)
        same = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
        return distillation_loss(got, wanted, direction), {"agreement": same}

    student.train().requires_grad_(True)
    log = train("distillation", student, schedule, loss_of_step, state, threads=threads)
    student.eval().requires_grad_(False)
    return log


@torch.no_grad()
def measure_agreement(
    teacher: Llada, student: Llada, rows: Sequence[torch.Tensor], ratio: float, seed: int
) -> tuple[float, float]:
    """How often the likeliest tokens agree at masked positions of rows [n], and how often where the student is sure.

    Sure is a probability above `CONFIDENT`; without such a position the second figure is 0.
    """
    same, sure = [], []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(seed + number)
        masks = draw_masks((1, len(row)), torch.tensor([ratio]), generator).to(row.device)
        masked = mask_rows(row[None], masks, teacher.config.mask_token_id)
        wanted, got = teacher(masked, masks), student(masked, masks)
        same.append(wanted.argmax(-1) == got.argmax(-1))
        sure.append(got.softmax(-1).amax(-1) > CONFIDENT)
    agreed, confident = torch.cat(same), torch.cat(sure)
    return float(agreed.float().mean()), float(agreed[confident].float().mean()) if confident.any() else 0.0
