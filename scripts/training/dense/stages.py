"""The two stages of the distillation, and what is measured before and after.

Stage 1: every block on its own learns its sparse block's output, from the teacher's hidden states, so that no layer
sees another one's error.  Its loss is the normalised mean squared error, ‖ŷ − y‖² / ‖y‖² over a batch.

Stage 2: the whole student learns the teacher's next-token distribution, forward KL(teacher ‖ student) in nats, on
conversations and there on the assistant's tokens alone.

Source: the recipe of the Laguna-XS.2-dense model card; its first stage follows RADLADS (arXiv:2505.03005).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.text import Chats, Text
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.pruning.losses import mean_loss

USAGE_BATCHES = 8
STAGE1_LR, STAGE2_LR = 3e-3, 1e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the outcome besides teacher and text.  A batch is rows × length tokens; log_every is in steps."""

    seed: int
    stage1_steps: int
    stage2_steps: int
    rows: int
    length: int
    log_every: int = 10


class Blocks:
    """Reads what goes into the teacher's feed-forward blocks and what comes out, while it runs."""

    def __init__(self, teacher: LagunaForCausalLM, layers: list[int]) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [teacher.model.layers[layer].mlp.register_forward_hook(self._keep(layer)) for layer in layers]

    def _keep(self, layer: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(_module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.seen[layer] = inputs[0].detach().float(), output.detach().float()

        return keep

    def close(self) -> None:
        """Take the hooks off the teacher again."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def count_usage(teacher: LagunaForCausalLM, layers: list[int], text: Text, recipe: Recipe) -> dict[int, torch.Tensor]:
    """Layer → how often the router chose each expert [E] on a few batches."""
    counts = {layer: torch.zeros(teacher.config.num_experts) for layer in layers}

    def count(layer: int) -> Callable[..., None]:
        def add(_router: nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            counts[layer] += torch.bincount(output[2].flatten().cpu(), minlength=teacher.config.num_experts)

        return add

    handles = [teacher.model.layers[layer].mlp.gate.register_forward_hook(count(layer)) for layer in layers]
    for number in range(USAGE_BATCHES):
        teacher.model(input_ids=text.batch(f"usage/{number}", recipe.rows, recipe.length).to(teacher.device))
    for handle in handles:
        handle.remove()
    return counts


def train_blocks(
    teacher: LagunaForCausalLM, blocks: nn.ModuleDict, text: Text, recipe: Recipe, state_file: Path
) -> list[dict[str, float]]:
    """Stage 1, in place.  The log has the mean NMSE as `loss` and each layer's as `layer N`."""
    layers = [int(name) for name in blocks]
    reader = Blocks(teacher, layers)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.no_grad():
            teacher.model(
                input_ids=text.batch(f"{recipe.seed}/1/{step}", recipe.rows, recipe.length).to(teacher.device)
            )
        errors = []
        for layer in layers:
            inputs, wanted = reader.seen[layer]
            errors.append(normalised_error(blocks[str(layer)](inputs), wanted))
        figures = {f"layer {layer}": error.item() for layer, error in zip(layers, errors, strict=True)}
        # The sum, not the mean: no block's gradient depends on how many others there are.
        return torch.stack(errors).sum(), {**figures, "mean": sum(figures.values()) / len(figures)}

    schedule = Schedule(recipe.stage1_steps, STAGE1_LR, weight_decay=0.01)
    log = train(
        "stage 1", blocks, schedule, loss_of_step, state_file, log_every=recipe.log_every, clipped=list(blocks.values())
    )
    reader.close()
    return log


def normalised_error(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """‖got − wanted‖² / ‖wanted‖² over all tokens of a batch."""
    return (got - wanted).square().sum() / wanted.square().sum()


def train_student(
    teacher: LagunaForCausalLM, student: LagunaForCausalLM, chats: Chats, recipe: Recipe, state_file: Path
) -> list[dict[str, float]]:
    """Stage 2, in place.  The log has the KL in nats per token as `loss`."""

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        ids, spoken = chats.batch(f"{recipe.seed}/2/{step}", recipe.rows, recipe.length)
        return divergence(teacher, student, ids.to(teacher.device), spoken.to(teacher.device)), {}

    schedule = Schedule(recipe.stage2_steps, STAGE2_LR, weight_decay=0.01)
    student.train()
    log = train("stage 2", student, schedule, loss_of_step, state_file, log_every=recipe.log_every)
    student.eval()
    return log


def divergence(
    teacher: LagunaForCausalLM, student: LagunaForCausalLM, ids: torch.Tensor, spoken: torch.Tensor
) -> torch.Tensor:
    """Mean forward KL(teacher ‖ student), nats, where the next token is marked in `spoken`; both [rows, length].

    A batch in which the assistant says nothing (rows shorter than the questions) has 0.
    """
    predicted = spoken[:, 1:]
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[:, :-1][predicted].float().log_softmax(-1)
    got = student(input_ids=ids).logits[:, :-1][predicted].float().log_softmax(-1)
    return F.kl_div(got, wanted, reduction="sum", log_target=True) / max(1, len(got))


@torch.no_grad()
def measure(
    teacher: LagunaForCausalLM, student: LagunaForCausalLM, rows: list[torch.Tensor], chats: Chats, recipe: Recipe
) -> dict[str, float]:
    """Held-out figures of both models.

    Their next-token loss on rows of text, and on chats the KL and how often both models' likeliest tokens are the same.
    """
    kl, same, count = 0.0, 0, 0
    for number in range(USAGE_BATCHES):
        ids, spoken = (t.to(teacher.device) for t in chats.batch(f"held-out/{number}", recipe.rows, recipe.length))
        best = [model(input_ids=ids).logits[:, :-1][spoken[:, 1:]].argmax(-1) for model in (teacher, student)]
        kl += float(divergence(teacher, student, ids, spoken)) * len(best[0])
        same += int((best[0] == best[1]).sum())
        count += len(best[0])
    placed = [row.to(teacher.device) for row in rows]
    losses = {"loss_teacher": mean_loss(teacher, placed), "loss_student": mean_loss(student, placed)}
    return losses | {"kl": kl / max(1, count), "same_top_token": same / max(1, count)}
