"""How much arithmetic a distillation is, and the hours that it takes at a share of a device's peak that is assumed.

A weight costs two floating point operations a token forward and four backward; activations that are made again cost the
forward pass once more.  Attention costs 4 · Q a token and key forward, with Q the query width, over the keys that a
token sees.  Not counted: norms, softmax, what is measured, and the reading of the teacher's shards.
"""

from __future__ import annotations

import msgspec

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.plan.sizes import Sizes
from laguna_serve.serving.checkpoint.parameters import EXPERTS, list_modules
from laguna_serve.serving.checkpoint.target import Target

FORWARD, BACKWARD = 1, 2  # in forward passes


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


def plan_work(config: DistillConfig, sizes: Sizes, devices: tuple[int, ...]) -> tuple[WorkPlan, ...]:
    """Plan every stage on each number of devices, at `config.mfu` of `config.tflops`."""
    recipe = config.recipe
    batch = recipe.rows * recipe.length
    teacher = count_teacher_flops(sizes.target, recipe.length)
    student = count_student_flops(sizes, recipe.length)
    blocks = sum(2 * sizes.block(sizes.widths[number]) for number in sizes.sparse)
    first, second = recipe.stage1_steps * batch, recipe.stage2_steps * batch
    read = min(recipe.stage1_steps, recipe.stage1_batches or recipe.stage1_steps) * batch if config.layerwise else first
    stages = [("stage 1", first, read * teacher + first * (FORWARD + BACKWARD) * blocks)]
    passes = FORWARD + BACKWARD + (FORWARD if recipe.checkpointing else 0)
    beside = 0.0
    if config.store:
        stored = min(recipe.stage2_steps, recipe.stage2_batches or recipe.stage2_steps) * batch
        stages.append(("store", stored, stored * teacher))
    else:
        beside = second * teacher
    stages.append(("stage 2", second, beside + second * passes * student))
    rate = config.tflops * 1e12 * config.mfu * 3600
    return tuple(
        WorkPlan(stage=stage, tokens=tokens, flops=flops, hours={str(n): flops / rate / n for n in devices})
        for stage, tokens, flops in stages
    )


def count_teacher_flops(target: Target, length: int) -> float:
    """Count what a token of a row of `length` costs the teacher forward, its head among it."""
    weights = float(target.vocab_size * target.hidden_size)
    for module in list_modules(target):
        share = target.experts_per_token / target.num_experts if EXPERTS in module.name else 1.0
        weights += module.numel * share
    return 2 * weights + _count_attention(target, length)


def count_student_flops(sizes: Sizes, length: int) -> float:
    """Count what a token of a row of `length` costs the student forward, its head among it."""
    target = sizes.target
    layers = sum(sizes.layer(number) for number in range(target.num_layers))
    return 2.0 * (layers + target.vocab_size * target.hidden_size) + _count_attention(target, length)


def _count_attention(target: Target, length: int) -> float:
    total = 0.0
    for heads, kind in zip(target.heads, target.attention_kinds, strict=True):
        window = target.sliding_window if kind == "sliding_attention" else None
        total += 4 * heads * target.head_dim * mean_keys(length, window or length)
    return total


def mean_keys(length: int, window: int) -> float:
    """Average how many keys a token of a row sees: those up to its own, at most `window`."""
    short = min(length, window)
    return (short * (short + 1) / 2 + (length - short) * short) / length
