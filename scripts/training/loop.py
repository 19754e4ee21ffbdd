"""The training loop that every trained model shares: schedule, progress, and a state file to resume from.

Every batch is a function of (seed, step) alone, so a run that was interrupted and resumed equals one that was not.
Where several processes train one module (`ranks`), each gives the losses of its share of the batch, gradients and
figures are summed, and the first one writes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from laguna_serve.scripts.training.optimiser import Moments, Optimiser
from laguna_serve.scripts.training.ranks import ALONE, Ranks
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.signals import check_signals

THREADS = 2  # fixed, because the order of a sum depends on it
WARM_UP_STEPS = 100
FINAL_LR_SHARE = 0.05
SAVE_EVERY = 200
PRINT_EVERY = 50

Curve = Literal["cosine", "linear", "constant"]
# The loss of a batch, or of a part of it, and figures to print.
Loss = tuple[torch.Tensor, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: AdamW with a linear warm-up and then a curve down to a twentieth of the peak, or none."""

    steps: int
    peak_lr: float
    weight_decay: float = 0.05
    curve: Curve = "cosine"
    warm_up: int = WARM_UP_STEPS
    moments: Moments = "float32"

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * step / self.steps)), "linear": 1 - step / self.steps}
        fall = left.get(self.curve, 1.0)
        return (
            self.peak_lr * min(1.0, (step + 1) / max(1, self.warm_up)) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * fall)
        )


def train(
    name: str,
    module: nn.Module,
    schedule: Schedule,
    loss_of_step: Callable[[int], Loss | Iterable[Loss]],
    state_file: Path,
    *,
    log_every: int = PRINT_EVERY,
    clipped: Sequence[nn.Module] | None = None,
    threads: int = THREADS,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train `module` in place; returns the log, one record per `log_every` steps with means over them.

    `loss_of_step(step)` gives the loss and figures to print, or those of one part of the batch after the other, which
    add up to them: only one part's activations exist at a time. Gradients are clipped to norm 1, those of each module
    in `clipped` by themselves (default: all together).

    The state file is written every `SAVE_EVERY` steps and after the last, and read back when it exists; the caller
    deletes it when the result is safe. Inside `defer_signals` it is written, too, when the run is asked to stop, which
    is obeyed between two steps: nothing is lost then.

    Raises:
        CommandError: a loss that is not finite, from which no step comes back. WriteError: the disk is full.
    """
    torch.set_num_threads(threads)
    optimiser = _open_optimiser(module, schedule, ranks)
    first = 0
    log: list[dict[str, float]] = []
    window: list[dict[str, float]] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimiser.load_state_dict(state)
        first, log, window = state["step"], state["log"], state.get("window", [])
        if ranks.first:
            print(f"{name}: resuming at step {first} of {schedule.steps}", file=sys.stderr)
    ranks.wait()  # before the first one writes the file again

    def save(step: int) -> None:
        state = {**optimiser.state_dict(), "step": step, "log": log, "window": window}
        if ranks.first:
            write_stream(state_file, lambda file: torch.save(state, file))
        ranks.wait()  # torchrun ends the one that writes where another one is first to end

    started = time.monotonic()
    for step in range(first, schedule.steps):
        if is_asked_to_stop(ranks):
            save(step)
            raise KeyboardInterrupt
        optimiser.clear()
        total = ranks.add(_add_gradients(loss_of_step(step)))
        if not math.isfinite(total["loss"]):
            got = f"{total['loss']} in step {step + 1} of {schedule.steps}"
            raise CommandError(f"{name}: expected a finite loss, got {got}; lower the learning rate")
        optimiser.add_gradients(ranks)
        optimiser.step(schedule.lr(step), clipped or [module])
        window.append(total)
        done = step + 1
        if done % log_every == 0 or done == schedule.steps:
            log.append({"step": float(done), **_average(window)})
            window.clear()
        if ranks.first and (done % PRINT_EVERY == 0 or done == schedule.steps):
            left_s = (time.monotonic() - started) / (done - first) * (schedule.steps - done)
            figures = _average(window) if window else {key: log[-1][key] for key in total}
            _print_progress(f"{name}: step {done}/{schedule.steps}", figures, left_s)
        if done % SAVE_EVERY == 0 or done == schedule.steps:
            save(done)
    return log


def _add_gradients(parts: Loss | Iterable[Loss]) -> dict[str, float]:
    """Run the backward passes of a batch's parts; returns the sums of their losses and figures."""
    total: dict[str, float] = {}
    for loss, figures in [parts] if isinstance(parts, tuple) else parts:
        loss.backward()
        for key, value in {"loss": loss.item(), **figures}.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _average(window: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(figures[key] for figures in window) / len(window) for key in window[0]}


def _print_progress(place: str, figures: dict[str, float], left_s: float) -> None:
    shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
    print(f"{place}  {shown}  {left_s / 60:.1f} min left", file=sys.stderr, flush=True)


def _open_optimiser(module: nn.Module, schedule: Schedule, ranks: Ranks) -> Optimiser:
    if ranks.size > 1:
        from laguna_serve.scripts.training.sharded import ShardedOptimiser, is_sharded  # slow to import

        if is_sharded(module):
            return ShardedOptimiser(module, schedule.weight_decay)
    return Optimiser(module, schedule.weight_decay, schedule.moments)


def is_asked_to_stop(ranks: Ranks) -> bool:
    """Say whether a signal has come to any of the processes, so that all of them stop between the same two steps."""
    try:
        check_signals()
    except KeyboardInterrupt:
        return ranks.add({"stop": 1.0})["stop"] > 0
    return ranks.add({"stop": 0.0})["stop"] > 0
