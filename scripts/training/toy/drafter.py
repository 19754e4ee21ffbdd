"""Train the toy drafter by the DFlash recipe.

Anchors from the teacher's own text, a block of masks after each, the teacher's hidden states before the anchor as
context, cross-entropy weighted towards the first positions.

The teacher is frozen, so its hidden states are computed once and kept in memory (bf16, 320 bytes per token and tap).
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LagunaForCausalLM

from laguna_serve.scripts.checkpoints.drafters.dflash import IGNORED, LagunaDrafter, TapReader
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter, choose_vocabulary, start_head
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.toy import tokenizer as vocabulary
from laguna_serve.scripts.training.toy.continuations import Continuations

ROWS = 8
ANCHORS = 20
POSITION_DECAY = 4.0
SCHEDULE = Schedule(steps=4400, peak_lr=3e-3, weight_decay=0.01)
DRAFT_VOCABULARY = 256


def drafter_shape(teacher: LagunaForCausalLM) -> DrafterShape:
    """Two layers of the teacher's width, tapping it after four of its six layers: 0.88 M parameters."""
    config = teacher.config
    return DrafterShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        target_layer_ids=(1, 3, 4, 5),
        mask_token_id=vocabulary.MASK,
        num_target_layers=config.num_hidden_layers,
        intermediate_size=640,
        token_ids={name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


class Context:
    """The teacher's hidden states for every row of the continuations, end to end: [tokens, taps, H] bf16."""

    def __init__(self, teacher: LagunaForCausalLM, data: Continuations, layer_ids: tuple[int, ...]) -> None:
        taps = TapReader(teacher, layer_ids)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), data.lengths.cumsum(0)])
        size = (int(self.starts[-1]), len(layer_ids), teacher.config.hidden_size)
        self.states = torch.empty(size, dtype=torch.bfloat16)
        order = data.lengths.argsort()
        for done, rows in enumerate(order.split(32)):
            longest = int(data.lengths[rows].max())
            with torch.no_grad():
                teacher.model(input_ids=data.tokens[rows, :longest])
            for row, states in zip(rows.tolist(), taps.read().to(torch.bfloat16), strict=True):
                self.states[self.starts[row] : self.starts[row + 1]] = states[: data.lengths[row]]
            if done % 50 == 0:
                print(f"drafter: hidden states {done * 32}/{len(order)} rows", file=sys.stderr, flush=True)
        for handle in taps.handles:
            handle.remove()

    def rows(self, rows: torch.Tensor, longest: int) -> torch.Tensor:
        """States [B, longest, taps, H] fp32, padded with whatever follows: the mask hides it."""
        index = (self.starts[rows, None] + torch.arange(longest)).clamp(max=len(self.states) - 1)
        return self.states[index].float()


def draft_batch(
    drafter: LagunaDrafter,
    embedding: torch.Tensor,
    head: torch.Tensor,
    data: Continuations,
    context: Context,
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, anchors, γ, V] and labels [B, anchors, γ] for random anchors in the generated part of random rows.

    V is the drafter's vocabulary.
    """
    gamma = drafter.shape.gamma
    rows = torch.tensor([rng.randrange(len(data.tokens)) for _ in range(ROWS)])
    first, last = data.prompt_lengths[rows], data.lengths[rows] - gamma - 1
    anchors = torch.tensor(
        [[rng.randint(a, b) for _ in range(ANCHORS)] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    )
    index = anchors[..., None] + torch.arange(gamma + 1)
    tokens = data.tokens[rows, None].expand(-1, ANCHORS, -1).gather(2, index)
    block = torch.full_like(tokens, drafter.shape.mask_token_id)
    block[..., 0] = tokens[..., 0]
    longest = int(anchors.max())
    context_positions = torch.arange(longest).expand(ROWS, -1)
    sees_context = context_positions[:, None] < anchors.repeat_interleave(gamma + 1, dim=1)[..., None]
    owner = torch.arange(ANCHORS).repeat_interleave(gamma + 1)
    sees_block = (owner[:, None] == owner).expand(ROWS, -1, -1)
    hidden = drafter(
        F.embedding(block.flatten(1), embedding),
        index.flatten(1),
        context.rows(rows, longest),
        context_positions,
        torch.cat([sees_context, sees_block], dim=-1),
    )
    predicted = hidden.view(ROWS, ANCHORS, gamma + 1, -1)[:, :, 1:]
    return drafter.logits(predicted, head), drafter.labels(tokens[..., 1:])


def accepted_length(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """τ as verification would count it: one plus the mean length of the correct prefix."""
    return 1 + float((logits.argmax(-1) == labels).long().cumprod(-1).sum(-1).float().mean())


def make_drafter(teacher: LagunaForCausalLM, seed: int) -> LagunaDrafter:
    """Make the untrained drafter in Laguna's own format."""
    torch.manual_seed(seed)
    return LagunaDrafter(drafter_shape(teacher))


def make_speculators(teacher: LagunaForCausalLM, data: Continuations, seed: int) -> SpeculatorsDrafter:
    """Make the untrained drafter in the speculators format: one layer, three taps, half of the vocabulary."""
    torch.manual_seed(seed)
    shape = replace(
        drafter_shape(teacher),
        target_layer_ids=(1, 3, 5),
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=320,
        partial_rotary_factor=1.0,
    )
    written = [row[start:end] for row, start, end in zip(data.tokens, data.prompt_lengths, data.lengths, strict=True)]
    drafter = SpeculatorsDrafter(shape, choose_vocabulary(torch.cat(written), DRAFT_VOCABULARY, shape.vocab_size))
    start_head(drafter, teacher.lm_head.weight)
    return drafter


def train_drafter(
    drafter: LagunaDrafter,
    teacher: LagunaForCausalLM,
    data: Continuations,
    seed: int,
    steps: int | None,
    state_file: Path,
) -> list[dict[str, float]]:
    """Train on the continuations, in place; returns the training log."""
    teacher = teacher.eval().requires_grad_(False)
    embedding, head = teacher.model.embed_tokens.weight, teacher.lm_head.weight
    context = Context(teacher, data, drafter.shape.target_layer_ids)
    weights = torch.exp(-torch.arange(drafter.shape.gamma).float() / POSITION_DECAY)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"{seed}/{step}")
        logits, labels = draft_batch(drafter, embedding, head, data, context, rng)
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none", ignore_index=IGNORED)
        weighted = (loss.view(labels.shape) * weights).mean() / weights.mean()
        return weighted, {"tau": accepted_length(logits, labels)}

    schedule = Schedule(steps or SCHEDULE.steps, SCHEDULE.peak_lr, SCHEDULE.weight_decay)
    return train("drafter", drafter, schedule, loss_of_step, state_file)
