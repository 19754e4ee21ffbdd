"""The two stages of the distillation, and what is measured before and after.

Stage 1: every block on its own learns its sparse block's output, from the teacher's hidden states, so that no layer
sees another one's error. Its loss is the normalised mean squared error, ‖ŷ − y‖² / ‖y‖² over a batch.

Stage 2: the whole student learns the teacher's next-token distribution, forward KL(teacher ‖ student) in nats, on
conversations and there on the assistant's tokens alone. A batch's loss is the mean over its predicted tokens, however
many parts and processes it is computed in.

Source: the recipe of the Laguna-XS.2-dense model card; its first stage follows RADLADS (arXiv:2505.03005).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributions import Categorical
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.initial import Usage, Watch
from laguna_serve.scripts.training.dense.losses import Top, normalised_error, sum_over_places
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES, Batch, Targets
from laguna_serve.scripts.training.dense.text import Text
from laguna_serve.scripts.training.loop import THREADS, Loss, Schedule, train
from laguna_serve.scripts.training.pruning.losses import mean_loss
from laguna_serve.scripts.training.ranks import ALONE, Ranks

USAGE_BATCHES = 8
WEIGHT_DECAY = 0.01


class Blocks:
    """Reads what goes into the teacher's feed-forward blocks and what comes out, while it runs."""

    def __init__(self, blocks: dict[int, nn.Module]) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [block.register_forward_hook(self._keep(layer)) for layer, block in blocks.items()]

    def _keep(self, layer: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(_module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.seen[layer] = inputs[0].detach().float(), output.detach().float()

        return keep

    def close(self) -> None:
        """Take the hooks off the teacher again."""
        for handle in self._handles:
            handle.remove()


def schedule_of(recipe: Recipe, stage: int) -> Schedule:
    """Return how long and how fast a stage learns."""
    steps, lr = (recipe.stage1_steps, recipe.stage1_lr) if stage == 1 else (recipe.stage2_steps, recipe.stage2_lr)
    moments = "float32" if stage == 1 else recipe.moments
    return Schedule(steps, lr, WEIGHT_DECAY, recipe.schedule, recipe.warm_up, moments)


@torch.no_grad()
def count_usage(teacher: LagunaForCausalLM, layers: list[int], text: Text, recipe: Recipe) -> dict[int, Usage]:
    """Layer → what the router chose on a few batches."""
    watch = Watch()
    for layer in layers:
        watch.add(layer, teacher.model.layers[layer].mlp.gate, teacher.config.num_experts)
    for number in range(USAGE_BATCHES):
        teacher.model(input_ids=text.batch(f"usage/{number}", recipe.rows, recipe.length).to(teacher.device))
    watch.close()
    return watch.usage


def train_blocks(
    teacher: LagunaForCausalLM,
    blocks: nn.ModuleDict,
    text: Text,
    recipe: Recipe,
    state_file: Path,
    threads: int = THREADS,
) -> list[dict[str, float]]:
    """Stage 1, in place. The log has the sum of the NMSE as `loss`, their mean, and each layer's as `layer N`."""
    layers = [int(name) for name in blocks]
    reader = Blocks({layer: teacher.model.layers[layer].mlp for layer in layers})

    def loss_of_step(step: int) -> Loss:
        with torch.no_grad():
            ids = text.batch(recipe.batch_of(1, step), recipe.rows, recipe.length)
            teacher.model(input_ids=ids.to(teacher.device))
        errors = []
        for layer in layers:
            inputs, wanted = reader.seen[layer]
            errors.append(normalised_error(blocks[str(layer)](inputs), wanted))
        figures = {f"layer {layer}": error.item() for layer, error in zip(layers, errors, strict=True)}
        # The sum, not the mean: no block's gradient depends on how many others there are.
        return torch.stack(errors).sum(), {**figures, "mean": sum(figures.values()) / len(figures)}

    log = train(
        "stage 1",
        blocks,
        schedule_of(recipe, 1),
        loss_of_step,
        state_file,
        log_every=recipe.log_every,
        clipped=list(blocks.values()),
        threads=threads,
    )
    reader.close()
    return log


class Taught(nn.Module):
    """The student with its loss as one forward pass: FSDP gathers the weights of what is called, and of that alone."""

    def __init__(self, student: LagunaForCausalLM) -> None:
        super().__init__()
        self.student = student

    def forward(self, ids: torch.Tensor, predicted: torch.Tensor, top: Top, chunk: int) -> torch.Tensor:
        """Sum the KL over the predicted places [R, L − 1] of rows of ids [R, L]."""
        hidden = self.student.model(input_ids=ids).last_hidden_state[:, :-1][predicted]
        return sum_over_places(self.student, hidden, top, chunk)


def train_student(
    student: LagunaForCausalLM,
    targets: Targets,
    recipe: Recipe,
    state_file: Path,
    threads: int = THREADS,
    ranks: Ranks = ALONE,
    watch: Callable[[LagunaForCausalLM, int], None] | None = None,
) -> list[dict[str, float]]:
    """Stage 2, in place; the student is fp32 before and after. The log has the KL in nats per token as `loss`.

    `watch` sees the student in front of every step; it is refused with `recipe.fsdp`, where nobody has it whole.
    With `recipe.fsdp` a copy is trained in parts, and the student waits in the machine's memory meanwhile.
    """
    if recipe.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    device = student.device
    if recipe.fsdp:
        taught = _shard_copy(student, getattr(torch, recipe.weights))
    else:
        taught = Taught(student.to(getattr(torch, recipe.weights)))

    def losses_of_step(step: int) -> Iterator[Loss]:
        if watch is not None:
            watch(student, step)
        batch = targets.batch(step)
        places = max(1, int(batch.predicted.sum()))
        for rows in split(ranks.share(recipe.rows), recipe.accumulate):
            yield sum_kl(taught, targets, batch, rows, recipe.logit_chunk) / places, {}

    log = train(
        "stage 2",
        taught if recipe.fsdp else student,
        schedule_of(recipe, 2),
        losses_of_step,
        state_file,
        log_every=recipe.log_every,
        threads=threads,
        ranks=ranks,
    )
    if recipe.fsdp:
        _take_back(taught, student, device)
    if recipe.checkpointing:
        student.gradient_checkpointing_disable()
    student.float().eval()
    return log


def _shard_copy(student: LagunaForCausalLM, computed_in: torch.dtype) -> Taught:
    """Share a copy out among the processes, and move the student out of the way."""
    from laguna_serve.scripts.training.sharded import shard  # slow to import

    device = student.device
    taught = Taught(copy.deepcopy(student.cpu()))
    shard(taught, taught.student.model.layers, computed_in, device)
    return taught


def _take_back(taught: Taught, student: LagunaForCausalLM, device: torch.device) -> None:
    """Take over what a sharded copy has become."""
    from laguna_serve.scripts.training.sharded import gather  # slow to import

    state = Taught(student).state_dict()
    for name, whole in gather(taught):
        state[name].copy_(whole)
    student.to(device)


def split(rows: slice, parts: int) -> list[slice]:
    """Cut rows into so many parts, as even as it goes; fewer where there are fewer rows."""
    count = rows.stop - rows.start
    cuts = [rows.start + number * count // parts for number in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(cuts) if a < b]


def sum_kl(taught: Taught, targets: Targets, batch: Batch, rows: slice, chunk: int = 0) -> torch.Tensor:
    """Sum the KL over the predicted places of some rows, with the student's gradients."""
    device = taught.student.device
    ids, predicted = batch.ids[rows].to(device), batch.predicted[rows].to(device)
    loss: torch.Tensor = taught(ids, predicted, targets.top(batch, rows).to(device), chunk)
    return loss


@torch.no_grad()
def measure(
    student: LagunaForCausalLM,
    targets: Targets,
    rows: list[torch.Tensor],
    teacher: LagunaForCausalLM | None = None,
) -> dict[str, float]:
    """Held-out figures.

    The next-token loss on rows of text, of the teacher too where it is in memory, and on held-out conversations the KL,
    how often both models' likeliest tokens are the same, and both entropies in nats (the teacher's with all tokens that
    a store has not kept as one: a lower bound).
    """
    kl, same, count, entropy, teachers = 0.0, 0, 0, 0.0, 0.0
    for number in range(HELD_OUT_BATCHES):
        batch = targets.held_out(number)
        everything = slice(0, len(batch.ids))
        kl += float(sum_kl(Taught(student), targets, batch, everything))
        top = targets.top(batch, everything)
        likeliest = top.logprobs.argmax(-1) if top.ids is None else top.ids[:, 0]
        logits = student(input_ids=batch.ids.to(student.device)).logits[:, :-1][batch.predicted.to(student.device)]
        entropy += float(Categorical(logits=logits.float(), validate_args=False).entropy().sum())  # of no place, too
        teachers += float(top.entropy().sum())
        same += int((logits.argmax(-1).cpu() == likeliest.cpu()).sum())
        count += len(likeliest)
    placed = [row.to(student.device) for row in rows]
    losses = {"loss_teacher": mean_loss(teacher, placed)} if teacher is not None else {}
    losses["loss_student"] = mean_loss(student, placed)
    sums = {"kl": kl, "same_top_token": same, "entropy_student": entropy, "entropy_teacher": teachers}
    return losses | {name: value / max(1, count) for name, value in sums.items()}
