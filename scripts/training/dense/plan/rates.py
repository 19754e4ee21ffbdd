"""What a device computes a second: as others measured it on an H100, or timed on the device at hand.

Timed is what the stages run, on random weights at the full width and at a few layers' depth: one sparse layer of each
kind of attention forward, a dense block with its loss and AdamW, and students of as many and of twice as many layers.
The difference of the two is what layers take, the rest what the head and the loss do. Not timed: shards and hidden
states read from disk, and the exchange between devices.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LagunaConfig, LagunaForCausalLM
from transformers.models.laguna.modeling_laguna import LagunaMLP

from laguna_serve.plugins.layers import SPARSE
from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.losses import Top, normalised_error
from laguna_serve.scripts.training.dense.plan.sizes import Sizes
from laguna_serve.scripts.training.dense.plan.work import (
    BACKWARD,
    FORWARD,
    Rates,
    count_head,
    count_passes,
    count_student_layers,
    count_teacher_layers,
)
from laguna_serve.scripts.training.dense.stages import WEIGHT_DECAY, Taught, split
from laguna_serve.scripts.training.dense.student import student_config
from laguna_serve.scripts.training.optimiser import Optimiser
from laguna_serve.scripts.training.pruning.streaming.layers import read_laguna
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress

PASSES = 3  # timed, after one that is not
LR = 1e-6


def assume_rates(config: DistillConfig) -> Rates:
    """Take shares of a device's peak, --mfu and --teacher-mfu of --tflops, for granted."""
    peak = config.tflops * 1e12
    shares = f"{config.mfu:.0%} of {config.tflops:g} TFLOP/s, sparse layers forward {config.teacher_mfu:.0%}"
    return Rates(
        teacher=config.teacher_mfu * peak,
        block=config.mfu * peak,
        student=config.mfu * peak,
        source=f"at {shares}, not measured here (--mfu, --teacher-mfu, --tflops; --measure times this device)",
    )


def measure_rates(config: DistillConfig, folder: Path, sizes: Sizes) -> Rates:
    """Time this device on random weights of the config's size. Raises CommandError where it has no room for them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads)
    laguna, stopwatch = read_laguna(folder), Stopwatch(device)
    try:
        teacher = _time_teacher(config, laguna, sizes, stopwatch)
        block = _time_block(config, laguna, sizes, stopwatch)
        student = _time_student(config, laguna, sizes, stopwatch)
    except torch.OutOfMemoryError as error:
        remedy = "raise --accumulate, lower --rows or --length, or pass --checkpointing"
        raise CommandError(f"--measure: expected room for one part of a batch, got {error}; {remedy}") from None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"this CPU, {config.threads} threads"
    rates = (
        f"{teacher / 1e12:.3g} TFLOP/s the teacher's layers, {block / 1e12:.3g} a block, {student / 1e12:.3g} stage 2"
    )
    return Rates(teacher=teacher, block=block, student=student, source=f"as measured on {name}: {rates}")


class Stopwatch:
    """Times what a device does, in seconds, and says on stderr what is being timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._progress = Progress()

    def time(self, name: str, act: Callable[[], Any]) -> float:
        """Take the median of PASSES calls, after one that warms up."""
        seconds = []
        self._progress.begin()
        for number in range(PASSES + 1):
            self._progress.step(f"timing {name}", number, PASSES + 1)
            started = time.perf_counter()
            act()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        self._progress.step(f"timing {name}", PASSES + 1, PASSES + 1)
        return median(seconds[1:])


def _time_teacher(config: DistillConfig, laguna: LagunaConfig, sizes: Sizes, stopwatch: Stopwatch) -> float:
    chosen = choose_layers(sizes)
    described = shorten(laguna, chosen)
    # As the layers are read and run (pruning/streaming/layers.py).
    described._experts_implementation = "eager"
    dtype = torch.bfloat16 if stopwatch.device.type == "cuda" else torch.float32
    model = _draw(described, dtype, stopwatch.device)
    ids = _draw_ids(config, config.rows, laguna, stopwatch.device)
    with torch.no_grad():
        seconds = stopwatch.time("the teacher", lambda: model.model(input_ids=ids))
    layers = count_teacher_layers(sizes.target, config.length)
    return sum(layers[number] for number in chosen) * ids.numel() / seconds


def _time_block(config: DistillConfig, laguna: LagunaConfig, sizes: Sizes, stopwatch: Stopwatch) -> float:
    width = max(sizes.widths[number] for number in sizes.sparse)
    with stopwatch.device:
        block = LagunaMLP(laguna, width)
        states = torch.randn(config.rows, config.length, laguna.hidden_size)
    optimiser, wanted = Optimiser(block, WEIGHT_DECAY), states.roll(1, 0)

    def step() -> None:
        optimiser.clear()
        normalised_error(block(states), wanted).backward()
        optimiser.step(LR, [block])

    seconds = stopwatch.time("a block of stage 1", step)
    return 2 * sizes.block(width) * (FORWARD + BACKWARD) * config.rows * config.length / seconds


def _time_student(config: DistillConfig, laguna: LagunaConfig, sizes: Sizes, stopwatch: Stopwatch) -> float:
    """Time stage 2 by two depths, and put the whole student's rate together from what a layer and the head take."""
    chosen, passes, tokens = choose_layers(sizes), count_passes(config), config.rows * config.length
    one = _time_steps(config, laguna, sizes, chosen, stopwatch)
    two = _time_steps(config, laguna, sizes, chosen * 2, stopwatch)
    layers = count_student_layers(sizes, config.length)
    of_chosen, of_all = sum(layers[number] for number in chosen), sum(layers)
    if two <= one:
        got = f"{one:.3g} s with {len(chosen)} layers and {two:.3g} s with {2 * len(chosen)}"
        raise CommandError(f"--measure: expected more layers to take longer, got {got}; raise --rows or --length")
    head = max(0.0, one - (two - one))
    seconds = (two - one) * of_all / of_chosen + head
    return (of_all + count_head(sizes.target)) * passes * tokens / seconds


def _time_steps(
    config: DistillConfig, laguna: LagunaConfig, sizes: Sizes, chosen: list[int], stopwatch: Stopwatch
) -> float:
    described = student_config(shorten(laguna, chosen), [1])
    student = _draw(described, torch.float32, stopwatch.device)
    with stopwatch.device:
        for layer, number in zip(student.model.layers, chosen, strict=True):
            layer.mlp = LagunaMLP(described, sizes.widths[number])
    if config.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    taught = Taught(student.train().to(getattr(torch, config.weights)))
    optimiser = Optimiser(student, WEIGHT_DECAY, config.moments)
    parts = split(slice(0, config.rows), config.accumulate)
    top = _draw_top(config, laguna, stopwatch.device)

    def step() -> None:
        optimiser.clear()
        for part in parts:
            ids = _draw_ids(config, part.stop - part.start, laguna, stopwatch.device)
            predicted = torch.ones(len(ids), config.length - 1, dtype=torch.bool, device=ids.device)
            places = slice(0, int(predicted.sum()))
            (taught(ids, predicted, top.at(places), config.logit_chunk) / places.stop).backward()
        optimiser.step(LR, [student])

    return stopwatch.time(f"stage 2 with {len(chosen)} layers", step)


def choose_layers(sizes: Sizes) -> list[int]:
    """Choose the first sparse layer of each kind of attention."""
    first: dict[str, int] = {}
    for number, (kind, attention) in enumerate(zip(sizes.target.mlp_kinds, sizes.target.attention_kinds, strict=True)):
        if kind == SPARSE:
            first.setdefault(attention, number)
    return sorted(first.values())


def shorten(config: LagunaConfig, chosen: list[int]) -> LagunaConfig:
    """Return the config of a model that has the chosen layers alone, in this order, some of them several times."""
    described, count = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(described, name, [value[number] for number in chosen])
    described.num_hidden_layers = len(chosen)
    described._attn_implementation = "sdpa"
    return described


def _draw(config: LagunaConfig, dtype: torch.dtype, device: torch.device) -> LagunaForCausalLM:
    """Make a model of random weights."""
    torch.manual_seed(0)
    with device:
        return LagunaForCausalLM._from_config(config, dtype=dtype)


def _draw_ids(config: DistillConfig, rows: int, laguna: LagunaConfig, device: torch.device) -> torch.Tensor:
    return torch.randint(0, laguna.vocab_size, (rows, config.length), device=device)


def _draw_top(config: DistillConfig, laguna: LagunaConfig, device: torch.device) -> Top:
    """Draw a teacher's distribution at every place of one part of a batch: the store's K, or all without one."""
    places = -(-config.rows // config.accumulate) * (config.length - 1)
    if not config.store or not config.top_k:
        every = torch.randn(places, laguna.vocab_size, device=device).log_softmax(-1)
        return Top(None, every, torch.full((places,), -torch.inf, device=device))
    best = torch.randn(places, config.top_k + 1, device=device).log_softmax(-1)
    # No token twice in a place.
    ids = torch.randint(0, laguna.vocab_size, (places, 1), device=device) + torch.arange(config.top_k, device=device)
    return Top(ids % laguna.vocab_size, best[:, :-1], best[:, -1])
