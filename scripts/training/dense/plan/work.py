"""How much arithmetic a distillation is, and the hours that it takes at the rates of a device (rates.py).

A weight costs two floating point operations a token forward and four backward; activations that are made again cost the
forward pass once more. Attention costs 4 · Q a token and key forward, with Q the query width, over the keys that a
token sees. Not counted: norms, softmax, what is measured, and the reading of the teacher's shards.
"""

from __future__ import annotations

import msgspec

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.plan.sizes import Sizes
from laguna_serve.scripts.training.dense.stages import USAGE_BATCHES
from laguna_serve.serving.checkpoint.parameters import EXPERTS, list_modules
from laguna_serve.serving.checkpoint.target import Target

FORWARD, BACKWARD = 1, 2  # in forward passes


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a device computes, in floating point operations a second.

    Attributes:
        teacher: its sparse layers forward.
        block: a dense block of stage 1 forward and backward, AdamW's step among it.
        student: stage 2 forward and backward, likewise.
        source: where they come from, for a reader.
    """

    teacher: float
    block: float
    student: float
    source: str


class WorkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's tokens and arithmetic.

    Attributes:
        tokens: that go through it, the assistant's and all others.
        flops: over all devices, in floating point operations.
        hours: number of devices → hours.
    """

    stage: str
    tokens: int
    flops: float
    hours: dict[str, float]


def plan_work(config: DistillConfig, sizes: Sizes, devices: tuple[int, ...], rates: Rates) -> tuple[WorkPlan, ...]:
    """Plan every stage on each number of devices of these rates."""
    recipe = config.recipe
    batch = recipe.rows * recipe.length
    teacher = count_teacher_flops(sizes.target, recipe.length)
    first, second = recipe.stage1_steps * batch, recipe.stage2_steps * batch
    # A stage's name, its tokens, and operations, each with the rate that they are computed at.
    stages = [
        (
            "stage 1",
            first,
            [(count_seen_flops(config, sizes), rates.teacher), (first * count_block_flops(sizes), rates.block)],
        )
    ]
    beside = 0.0
    if config.store:
        stored = min(recipe.stage2_steps, recipe.stage2_batches or recipe.stage2_steps) * batch
        stages.append(("store", stored, [(stored * teacher, rates.teacher)]))
    else:
        beside = second * teacher
    learned = second * count_passes(config) * count_student_flops(sizes, recipe.length)
    stages.append(("stage 2", second, [(beside, rates.teacher), (learned, rates.student)]))
    return tuple(
        WorkPlan(
            stage=stage,
            tokens=tokens,
            flops=sum(flops for flops, _ in parts),
            hours={str(n): sum(flops / rate for flops, rate in parts) / 3600 / n for n in devices},
        )
        for stage, tokens, parts in stages
    )


def count_seen_flops(config: DistillConfig, sizes: Sizes) -> float:
    """Count what the teacher computes in stage 1, without its head, batches to count what its routers choose included.

    A layer at a time, every batch goes through all layers once, and in every step through the one that is learned.
    """
    recipe, layers = config.recipe, count_teacher_layers(sizes.target, config.length)
    steps, batch = recipe.stage1_steps + USAGE_BATCHES, recipe.rows * recipe.length
    if not config.layerwise:
        return steps * batch * sum(layers)
    distinct = min(recipe.stage1_steps, recipe.stage1_batches or recipe.stage1_steps) + USAGE_BATCHES
    return batch * (distinct * sum(layers) + steps * sum(layers[number] for number in sizes.sparse))


def count_passes(config: DistillConfig) -> int:
    """Count how many forward passes a step of stage 2 costs the student."""
    return FORWARD + BACKWARD + (FORWARD if config.recipe.checkpointing else 0)


def count_teacher_flops(target: Target, length: int) -> float:
    """Count what a token of a row of `length` costs the teacher forward, its head among it."""
    return sum(count_teacher_layers(target, length)) + count_head(target)


def count_student_flops(sizes: Sizes, length: int) -> float:
    """Count what a token of a row of `length` costs the student forward, its head among it."""
    return sum(count_student_layers(sizes, length)) + count_head(sizes.target)


def count_block_flops(sizes: Sizes) -> float:
    """Count what a token costs all blocks of stage 1, forward and backward."""
    return float(sum(2 * sizes.block(sizes.widths[number]) for number in sizes.sparse) * (FORWARD + BACKWARD))


def count_teacher_layers(target: Target, length: int) -> list[float]:
    """Count what a token of a row of `length` costs each of the teacher's layers forward."""
    layers = _count_attention(target, length)
    for module in list_modules(target):
        share = target.experts_per_token / target.num_experts if EXPERTS in module.name else 1.0
        layers[int(module.name.split(".")[2])] += 2 * module.numel * share
    return layers


def count_student_layers(sizes: Sizes, length: int) -> list[float]:
    """Count what a token of a row of `length` costs each of the student's layers forward."""
    attention = _count_attention(sizes.target, length)
    return [2.0 * sizes.layer(number) + keys for number, keys in enumerate(attention)]


def count_head(target: Target) -> float:
    """Count what a token's logits cost forward."""
    return 2.0 * target.vocab_size * target.hidden_size


def _count_attention(target: Target, length: int) -> list[float]:
    layers = []
    for heads, kind in zip(target.heads, target.attention_kinds, strict=True):
        window = target.sliding_window if kind == "sliding_attention" else None
        layers.append(4.0 * heads * target.head_dim * mean_keys(length, window or length))
    return layers


def mean_keys(length: int, window: int) -> float:
    """Average how many keys a token of a row sees: those up to its own, at most `window`."""
    short = min(length, window)
    return (short * (short + 1) / 2 + (length - short) * short) / length
