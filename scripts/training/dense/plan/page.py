"""The whole plan, from the flags, and as a page for a terminal."""

from __future__ import annotations

from pathlib import Path

import msgspec

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.plan.memory import (
    BF16,
    StagePlan,
    place_bytes,
    plan_stage1,
    plan_stage2,
)
from laguna_serve.scripts.training.dense.plan.rates import assume_rates, measure_rates
from laguna_serve.scripts.training.dense.plan.sizes import read_sizes
from laguna_serve.scripts.training.dense.plan.work import Rates, WorkPlan, plan_work
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES
from laguna_serve.serving.kit.tables import Table

CARD_BYTES = 80 * 10**9
# What the driver, the allocator's gaps and the libraries' workspaces take of a card.
RESERVE = 0.08
DEVICES = (1, 8)
GB = 10**9


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dense_memory/1"):
    """What it takes.

    Attributes:
        card: bytes of a card that are there to be used.
        hidden: bytes on disk of hidden states, with --layerwise, on each number of devices.
        store: bytes on disk of the store, were every token the assistant's; 0 without one.
        work: tokens, arithmetic and hours of every stage.
        rates: of the device that the hours are for.
    """

    teacher_parameters: int
    student_parameters: int
    card: int
    stages: tuple[StagePlan, ...]
    hidden: dict[str, int]
    store: int
    work: tuple[WorkPlan, ...] = ()
    rates: Rates | None = None


def plan_memory(config: DistillConfig, folder: Path) -> MemoryPlan:
    """Say what a distillation takes on CUDA devices, its hours on the device at hand with --measure.

    Raises:
        CommandError: the config cannot be used, or the device has no room to measure.
    """
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
    rates = measure_rates(config, folder, sizes) if config.measure else assume_rates(config)
    return MemoryPlan(
        teacher_parameters=sizes.teacher,
        student_parameters=sizes.student,
        card=card,
        stages=tuple(stages),
        hidden=hidden,
        store=store,
        work=plan_work(config, sizes, DEVICES, rates),
        rates=rates,
    )


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
    lines += ["", _format_work(plan)]
    return "\n".join(lines)


def _format_work(plan: MemoryPlan) -> str:
    """Render tokens, arithmetic and hours."""
    heads = ("", "tokens", "arithmetic, PFLOP", *(f"hours on {n}" for n in DEVICES))
    rows = [
        (w.stage, f"{w.tokens / 1e6:,.1f} M", f"{w.flops / 1e15:.4g}", *(f"{w.hours[str(n)]:.3g}" for n in DEVICES))
        for w in plan.work
    ]
    source = "not planned" if plan.rates is None else plan.rates.source
    return f"{Table('lrrrr', heads, rows).to_text()}\nhours: {source}"
