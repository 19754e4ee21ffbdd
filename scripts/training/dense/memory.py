"""What a distillation takes of memory and disk, from config.json and the flags alone.

T tokens are computed at a time: those of a part of a process's share of the batch.  Per token and layer the backward
pass finds, with b bytes a value (what norms read stays fp32), H hidden, Q query and KV key widths, W units:

    4 · (2H + Q + KV) + b · (4H + 5Q + 3KV + 4W)

and with checkpointing b · H, plus the above for the one layer that is being made again.  Logits take
(2b + 16) · V for each place that exists at a time.  Counted from the graph of transformers' Laguna with
`saved_tensors_hooks`; compared with measured peaks in tests/scripts/training/test_dense_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from transformers import LagunaConfig

from laguna_serve.plugins.layers import DENSE, SPARSE
from laguna_serve.scripts.training.dense.config import DistillConfig, Recipe
from laguna_serve.scripts.training.dense.store.format import SMALL_VOCABULARY
from laguna_serve.scripts.training.dense.student import choose_widths
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES
from laguna_serve.serving.checkpoint.parameters import count_other, count_parameters, list_modules
from laguna_serve.serving.checkpoint.target import Target, read_target
from laguna_serve.serving.kit.tables import Table

CARD_BYTES = 80 * 10**9
# What the driver, the allocator's gaps and the libraries' workspaces take of a card.
RESERVE = 0.08
DEVICES = (1, 8)
FP32, BF16 = 4, 2
MOMENTS = 8
GB = 10**9


@dataclass(frozen=True, slots=True)
class Sizes:
    """A student's sizes, and its teacher's.

    Attributes:
        widths: units of every layer.
        teacher: parameters.
        largest_layer: parameters of the teacher's largest decoder layer.
    """

    target: Target
    widths: tuple[int, ...]
    teacher: int
    largest_layer: int

    @property
    def student(self) -> int:
        """Parameters of the student at its true widths."""
        dense = replace(self.target, mlp_kinds=(DENSE,) * self.target.num_layers, quantisation=None)
        outside = sum(module.numel for module in list_modules(dense) if ".mlp." not in module.name)
        return outside + count_other(dense) + sum(self.block(width) for width in self.widths)

    def block(self, width: int) -> int:
        """Parameters of a dense block."""
        return 3 * self.target.hidden_size * width

    @property
    def sparse(self) -> list[int]:
        """Numbers of the layers whose blocks stage 1 trains."""
        return [number for number, kind in enumerate(self.target.mlp_kinds) if kind == SPARSE]

    def activations(self, layer: int, item: int) -> int:
        """Bytes that a token leaves in a layer for the backward pass."""
        t = self.target
        H, Q, KV = t.hidden_size, t.heads[layer] * t.head_dim, t.num_kv_heads * t.head_dim
        return FP32 * (2 * H + Q + KV) + item * (4 * H + 5 * Q + 3 * KV + 4 * self.widths[layer])


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


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dense_memory/1"):
    """What it takes.

    Attributes:
        card: bytes of a card that are there to be used.
        hidden: bytes on disk of hidden states, with --layerwise, on each number of devices.
        store: bytes on disk of the store, were every token the assistant's; 0 without one.
    """

    teacher_parameters: int
    student_parameters: int
    card: int
    stages: tuple[StagePlan, ...]
    hidden: dict[str, int]
    store: int


def read_sizes(folder: Path, overrides: dict[int, int]) -> Sizes:
    """Read a teacher's config.json. Raises CheckpointError, WidthError."""
    target = read_target(folder)
    widths = choose_widths(LagunaConfig.from_pretrained(folder), overrides)
    layers = [0] * target.num_layers
    for module in list_modules(target):
        layers[int(module.name.split(".")[2])] += module.numel
    return Sizes(target, tuple(widths), count_parameters(target), max(layers))


def plan_memory(config: DistillConfig, folder: Path) -> MemoryPlan:
    """Say what a distillation takes on CUDA devices. Raises CommandError where the config cannot be used."""
    sizes, recipe = read_sizes(folder, dict(config.width)), config.recipe
    card = int(CARD_BYTES * (1 - RESERVE))
    beside = 0 if config.store else BF16 * sizes.teacher
    stages = []
    for devices in DEVICES:
        whole = 0 if config.layerwise else BF16 * sizes.teacher
        held = whole or BF16 * sizes.largest_layer
        one = plan_stage1(sizes, recipe, devices, held, layerwise=config.layerwise)
        # With the whole teacher stage 1 runs in one process.
        if config.layerwise or devices == 1:
            stages.append(one)
        both = config.layerwise and config.store
        if both or devices == 1:
            stages.append(plan_stage2(sizes, recipe, devices, beside, card))
    batch = recipe.rows * recipe.length
    states = BF16 * sizes.target.hidden_size * batch * ((recipe.stage1_batches or recipe.stage1_steps) + 8)
    hidden = {str(n): states * (n + 1) for n in DEVICES} if config.layerwise else {}
    batches = (recipe.stage2_batches or recipe.stage2_steps) + HELD_OUT_BATCHES
    store = batches * batch * place_bytes(config.top_k, sizes.target.vocab_size) if config.store else 0
    return MemoryPlan(
        teacher_parameters=sizes.teacher,
        student_parameters=sizes.student,
        card=card,
        stages=tuple(stages),
        hidden=hidden,
        store=store,
    )


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
        optimiser=MOMENTS * parameters,
        activations=tokens * FP32 * sum(4 * width + 3 * sizes.target.hidden_size for width in blocks),
        logits=0,
        teacher=teacher,
        most_rows=recipe.rows,
    )


def plan_stage2(sizes: Sizes, recipe: Recipe, devices: int, teacher: int, card: int) -> StagePlan:
    """Plan stage 2: a whole student on every device, and the activations of a part of its share of the batch."""
    item = BF16 if recipe.weights == "bfloat16" else FP32
    P = sizes.student
    weights = item * P + (FP32 * P if item == BF16 else 0)
    # A narrow gradient exists until it is added to its master's.
    widest = max(sizes.target.vocab_size * sizes.target.hidden_size, sizes.block(max(sizes.widths)) // 3)
    gradients = FP32 * P + (item * widest if item == BF16 else 0)

    def needs(rows: int) -> tuple[int, int]:
        tokens = rows * recipe.length
        layers = [sizes.activations(number, item) for number in range(sizes.target.num_layers)]
        kept = len(layers) * item * sizes.target.hidden_size + max(layers) if recipe.checkpointing else sum(layers)
        places = min(tokens, recipe.logit_chunk or tokens)
        return tokens * kept, places * (2 * item + 4 * FP32) * sizes.target.vocab_size

    share = -(-recipe.rows // devices)
    activations, logits = needs(-(-share // recipe.accumulate))
    fixed = weights + gradients + MOMENTS * P + teacher
    most = 0
    while fixed + sum(needs(most + 1)) <= card and most < 1 << 16:
        most += 1
    return StagePlan(
        stage="stage 2",
        devices=devices,
        weights=weights,
        gradients=gradients,
        optimiser=MOMENTS * P,
        activations=activations,
        logits=logits,
        teacher=teacher,
        most_rows=most,
    )


def place_bytes(top_k: int, vocab_size: int) -> int:
    """Bytes of a place in a store (store/format.py); K = 0 is the whole vocabulary."""
    if not top_k or top_k >= vocab_size:
        return 2 * vocab_size + 4
    return top_k * (2 + (2 if vocab_size <= SMALL_VOCABULARY else 4)) + 4


def format_plan(plan: MemoryPlan) -> str:
    """Render the plan for a terminal, in GB of 10⁹ bytes."""
    heads = (
        "",
        "devices",
        "weights",
        "gradients",
        "moments",
        "activations",
        "logits",
        "teacher",
        "GB each",
        "of a card",
    )
    rows = []
    for s in plan.stages:
        parts = (s.weights, s.gradients, s.optimiser, s.activations, s.logits, s.teacher, s.total)
        fits = f"{s.total / plan.card:.0%}" + ("" if s.total <= plan.card else ", too much")
        rows.append((s.stage, str(s.devices), *(f"{part / GB:.1f}" for part in parts), fits))
    lines = [
        f"teacher {plan.teacher_parameters:,} parameters, student {plan.student_parameters:,}",
        Table("lrrrrrrrrl", heads, rows).to_text(),
        *(
            f"stage 2, {s.devices} devices: at most {s.most_rows} rows at a time"
            for s in plan.stages
            if s.stage == "stage 2"
        ),
        *(f"disk, {n} devices: {size / GB:.0f} GB of hidden states" for n, size in plan.hidden.items()),
    ]
    if plan.store:
        lines.append(f"disk: {plan.store / GB:.0f} GB of logits at most")
    return "\n".join(lines)
