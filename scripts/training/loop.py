"""The training loop that every trained model shares: schedule, progress, and a state file to resume from.

Every batch is a function of (seed, step) alone, so a run that was interrupted and resumed equals one that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.signals import check_signals

THREADS = 2  # fixed, because the order of a sum depends on it
WARM_UP_STEPS = 100
FINAL_LR_SHARE = 0.05
SAVE_EVERY = 200
PRINT_EVERY = 50


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: AdamW with a linear warm-up and a cosine down to a twentieth of the peak."""

    steps: int
    peak_lr: float
    weight_decay: float = 0.05

    def lr(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak_lr * min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def train(
    name: str,
    module: nn.Module,
    schedule: Schedule,
    loss_of_step: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    state_file: Path,
    *,
    log_every: int = PRINT_EVERY,
    clipped: Sequence[nn.Module] | None = None,
    threads: int = THREADS,
) -> list[dict[str, float]]:
    """Train `module` in place; returns the log, one record per `log_every` steps with means over them.

    `loss_of_step(step)` gives the loss and figures to print.  Gradients are clipped to norm 1, those of each module in
    `clipped` by themselves (default: all together).  The state file is written every `SAVE_EVERY` steps and after the
    last, and read back when it exists; the caller deletes it when the result is safe.  Inside `defer_signals` it is
    written, too, when the run is asked to stop, which is obeyed between two steps: nothing is lost then.
    """
    torch.set_num_threads(threads)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=schedule.weight_decay, fused=True)
    first = 0
    log: list[dict[str, float]] = []
    window: list[dict[str, float]] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first, log, window = state["step"], state["log"], state.get("window", [])
        print(f"{name}: resuming at step {first} of {schedule.steps}", file=sys.stderr)

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"log": log, "window": window}
        write_stream(state_file, lambda file: torch.save(state, file))

    started = time.monotonic()
    for step in range(first, schedule.steps):
        try:
            check_signals()
        except KeyboardInterrupt:
            save(step)
            raise
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss, figures = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        for part in clipped or [module]:
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        window.append({"loss": loss.item(), **figures})
        done = step + 1
        if done % log_every == 0 or done == schedule.steps:
            mean = {key: sum(w[key] for w in window) / len(window) for key in window[0]}
            log.append({"step": float(done), **mean})
            window.clear()
        if done % PRINT_EVERY == 0 or done == schedule.steps:
            mean = {key: value for key, value in log[-1].items() if key != "step"}
            left_s = (time.monotonic() - started) / (done - first) * (schedule.steps - done)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in mean.items())
            print(
                f"{name}: step {done}/{schedule.steps}  {shown}  {left_s / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
        if done % SAVE_EVERY == 0 or done == schedule.steps:
            save(done)
    return log
