"""Train the toy LLaDA on masked rows, from weights in which some heads already look at neighbours.

From scratch a small masked model with rotary positions alone stays at the loss of the tokens' frequencies for hundreds
of steps: nothing tells its heads left from right, near from far. Starting from a causal model mends that and costs a
training of its own. Here the first layers' heads start as what such a training would make of them: a head whose query
and key are constant, apart by the angle of a distance, looks at that distance. The constant comes from one dimension
that all embeddings share, so the format has nothing that LLaDA's has not, and all of it is trained on.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.model import Block, Llada
from laguna_serve.scripts.text.corpus import Module
from laguna_serve.scripts.training.diffusion.masking import draw_masks, masked_loss
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.toy import tokenizer as vocabulary
from laguna_serve.scripts.training.toy.teacher import ToyRows

LENGTH = 256
SCHEDULE = Schedule(steps=4000, peak_lr=3e-3)
RATIOS = (0.1, 0.9)
THREADS = 1
INIT_STD, EMBEDDING_STD = 0.06, 0.2
# Layer → the distances at which its first heads look, in tokens to the right.
DISTANCES = ((-1, 1, -2, 2), (-1, 1, -3, 3), (-1, 1))
# Of a positional head: the frequencies that it uses, and the score by which a distance exceeds the opposite one.
FREQUENCIES, SHARPNESS = 6, 4.0


def toy_config() -> LladaConfig:
    """Eight layers of 128 with four heads, 1.7 M parameters."""
    return LladaConfig(
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        n_layers=8,
        mlp_hidden_size=352,
        vocab_size=vocabulary.VOCAB_SIZE,
        embedding_size=vocabulary.VOCAB_SIZE,
        mask_token_id=vocabulary.MASK,
        eos_token_id=vocabulary.END,
        max_sequence_length=1024,
    )


class CutRows:
    """The toy teacher's training rows cut to LENGTH: a batch [rows, LENGTH] int64 for a seed and a step."""

    def __init__(self, modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> None:
        self._rows = ToyRows(modules, tokenizer)

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """Cut one of the toy teacher's batches."""
        return self._rows.batch(seed, step)[:, :LENGTH]


def start_model(seed: int) -> Llada:
    """Make the model with random weights and the heads of `DISTANCES`."""
    torch.manual_seed(seed)
    model = Llada(toy_config())
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            adds = ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight"))
            torch.nn.init.normal_(parameter, std=INIT_STD / 4 if adds else INIT_STD)
    with torch.no_grad():
        constant = _share_constant(model)
        for block, distances in zip(model.blocks, DISTANCES, strict=False):
            for head, distance in enumerate(distances):
                _look_at(block, head, distance, constant, model.config.rope_theta)
    return model


def _share_constant(model: Llada) -> float:
    """Give all embeddings the same first dimension, as large as the others together; its value after a norm."""
    size = model.config.d_model
    embedding = model.embedding.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, 0] = EMBEDDING_STD * math.sqrt(size - 1)
    return math.sqrt(size / 2)


def _look_at(block: Block, head: int, distance: int, constant: float, theta: float) -> None:
    """Make a head look at a distance, by the shared dimension alone."""
    width = block.head_size
    rows = slice(head * width, (head + 1) * width)
    frequencies = theta ** (-torch.arange(0, width, 2)[:FREQUENCIES] / width)
    strength = math.sqrt(SHARPNESS * math.sqrt(width)) / constant
    for weight, angles in ((block.q_proj.weight, frequencies * distance), (block.k_proj.weight, frequencies * 0)):
        weight[rows, 0] = 0.0
        weight[rows, 0][:FREQUENCIES] = strength * angles.cos()
        weight[rows, 0][width // 2 : width // 2 + FREQUENCIES] = strength * angles.sin()


def train_masked(model: Llada, rows: CutRows, seed: int, steps: int, state: Path) -> list[dict[str, float]]:
    """Train on masked rows, ratios even between `RATIOS`; returns the log."""

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        ids = rows.batch(seed, step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        ratios = RATIOS[0] + (RATIOS[1] - RATIOS[0]) * torch.rand(len(ids), generator=generator)
        return masked_loss(model, ids, draw_masks((len(ids), ids.shape[1]), ratios, generator)), {}

    return train("masked", model, Schedule(steps, SCHEDULE.peak_lr), loss_of_step, state, threads=THREADS)


@torch.no_grad()
def held_out_loss(model: Llada, modules: list[Module], tokenizer: PreTrainedTokenizerFast, ratio: float) -> float:
    """Masked loss in nats a token on the start of every held-out module, each position masked with chance `ratio`."""
    total, count = 0.0, 0
    for number, module in enumerate(modules):
        ids = torch.tensor([tokenizer(module.text)["input_ids"][:LENGTH]])
        masks = draw_masks((1, ids.shape[1]), torch.tensor([ratio]), torch.Generator().manual_seed(number))
        total += float(masked_loss(model, ids, masks)) * int(masks.sum())
        count += int(masks.sum())
    return total / count
