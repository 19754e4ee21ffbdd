"""What a distillation takes of memory and disk, from config.json and the flags alone.

T tokens are computed at a time: those of a part of a process's share of the batch. Per token and layer the backward
pass finds, with b bytes a value (what norms read stays fp32), H hidden, Q query and KV key widths, W units:

    4 · (2H + Q + KV) + b · (4H + 5Q + 3KV + 4W)

and with checkpointing b · H, plus the above for the one layer that is being made again. Logits take
(2b + 16) · V for each place that exists at a time. Counted from the graph of transformers' Laguna with
`saved_tensors_hooks`; compared with measured peaks in tests/scripts/training/test_dense_memory.py.
"""

from __future__ import annotations

import msgspec

from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.plan.sizes import FP32, Sizes
from laguna_serve.scripts.training.dense.store.format import SMALL_VOCABULARY

BF16 = 2
# Two moments of a weight; torchao's have an fp32 scale for every 256 values.
MOMENTS = {"float32": 8.0, "8bit": 2 * (1 + FP32 / 256)}


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on each of so many devices.

    Attributes:
        most_rows: rows that a part of a batch may have on a card; 0 where not one fits.
    """

    stage: str
    devices: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    teacher: int
    most_rows: int

    @property
    def total(self) -> int:
        """Everything on one device."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits + self.teacher


def plan_stage1(sizes: Sizes, recipe: Recipe, devices: int, teacher: int, *, layerwise: bool) -> StagePlan:
    """Plan stage 1: fp32 blocks, one at a time or all at once, each with its inputs, outputs and units."""
    blocks = [max(sizes.widths[n] for n in sizes.sparse)] if layerwise else [sizes.widths[n] for n in sizes.sparse]
    parameters = sum(sizes.block(width) for width in blocks)
    tokens = recipe.rows * recipe.length
    return StagePlan(
        stage="stage 1",
        devices=devices,
        weights=FP32 * parameters,
        gradients=FP32 * parameters,
        optimiser=int(MOMENTS["float32"] * parameters),
        activations=tokens * FP32 * sum(4 * width + 3 * sizes.target.hidden_size for width in blocks),
        logits=0,
        teacher=teacher,
        most_rows=recipe.rows,
    )


def plan_stage2(sizes: Sizes, recipe: Recipe, devices: int, teacher: int, card: int) -> StagePlan:
    """Plan stage 2: a student on every device, or its part, and the activations of a part of its share of the batch."""
    item = BF16 if recipe.weights == "bfloat16" else FP32
    sharded = recipe.fsdp and devices > 1
    weights, gradients = _hold_part(sizes, item, devices) if sharded else _hold_whole(sizes, item)
    moments = int(MOMENTS[recipe.moments] * sizes.student) // (devices if sharded else 1)

    def needs(rows: int) -> tuple[int, int]:
        tokens = rows * recipe.length
        layers = [sizes.activations(number, item) for number in range(sizes.target.num_layers)]
        kept = len(layers) * item * sizes.target.hidden_size + max(layers) if recipe.checkpointing else sum(layers)
        places = min(tokens, recipe.logit_chunk or tokens)
        return tokens * kept, places * (2 * item + 4 * FP32) * sizes.target.vocab_size

    share = -(-recipe.rows // devices)
    activations, logits = needs(-(-share // recipe.accumulate))
    fixed = weights + gradients + moments + teacher
    most = 0
    while fixed + sum(needs(most + 1)) <= card and most < 1 << 16:
        most += 1
    return StagePlan(
        stage="stage 2",
        devices=devices,
        weights=weights,
        gradients=gradients,
        optimiser=moments,
        activations=activations,
        logits=logits,
        teacher=teacher,
        most_rows=most,
    )


def _hold_whole(sizes: Sizes, item: int) -> tuple[int, int]:
    """Bytes of the weights, masters among them, and of the gradients."""
    P = sizes.student
    # A narrow gradient exists until it is added to its master's.
    widest = max(sizes.target.vocab_size * sizes.target.hidden_size, sizes.block(max(sizes.widths)) // 3)
    narrow = item < FP32
    return item * P + (FP32 * P if narrow else 0), FP32 * P + (item * widest if narrow else 0)


def _hold_part(sizes: Sizes, item: int, devices: int) -> tuple[int, int]:
    """Bytes of a process's part, and of what is gathered: all outside the layers, and two layers at a time.

    The gradients of one layer, or of what is outside, exist whole twice: as computed, and in fp32 on their way.
    """
    largest = max(sizes.layer(number) for number in range(sizes.target.num_layers))
    weights = FP32 * sizes.student // devices + item * (sizes.outside + 2 * largest)
    return weights, FP32 * sizes.student // devices + (item + FP32) * max(sizes.outside, largest)


def place_bytes(top_k: int, vocab_size: int) -> int:
    """Bytes of a place in a store (store/format.py); K = 0 is the whole vocabulary."""
    if not top_k or top_k >= vocab_size:
        return 2 * vocab_size + 4
    return top_k * (2 + (2 if vocab_size <= SMALL_VOCABULARY else 4)) + 4
