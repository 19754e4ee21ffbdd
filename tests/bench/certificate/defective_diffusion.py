"""Diffusion servers with planted defects, forked from one process: `defective_diffusion.py '[["none", [FLAGS…]], …]'`.

Each child breaks one rule of the engine and then serves as usual. SIGTERM ends them all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from laguna_serve.plugins.diffusion import predictor
from laguna_serve.plugins.diffusion.decoding import reference
from laguna_serve.plugins.diffusion.engine import loop  # noqa: F401 - imported once, before the forks
from laguna_serve.plugins.diffusion.proposing import interface
from laguna_serve.plugins.diffusion.server import app  # noqa: F401
from laguna_serve.plugins.diffusion.server.__main__ import main


def break_ties() -> None:
    """Of equal logits the highest id."""

    def choose(rows: torch.Tensor, canvas: Any, _reference: Any, _open: Any) -> torch.Tensor:
        values = rows.clone()
        values[:, canvas.mask_id] = -torch.inf
        return values.shape[-1] - 1 - values.flip(-1).argmax(-1)

    reference._choose_tokens = choose


def accept_strangers() -> None:
    """Every third step is followed by one on the same logits, which are another state's."""
    take_step = interface.Run.take_step

    def take(run: interface.Run, logits: torch.Tensor, *, keep: bool = True) -> None:
        block = run.canvas.find_block(run.state)
        take_step(run, logits, keep=keep)
        if run.steps % 3 == 0 and run.canvas.find_block(run.state) == block:
            take_step(run, logits, keep=keep)

    interface.Run.take_step = take  # type: ignore[method-assign]


def keep_stale_blocks() -> None:
    """Keys and values of the first block's surroundings serve for all blocks."""
    keep = predictor.Predictor._keep

    def keep_first(self: Any, ask: predictor.Ask, state: Any, sides: Any) -> None:
        contexts = ask.slot.contexts
        keep(self, ask, state, sides)
        ask.slot.contexts = contexts or ask.slot.contexts

    predictor.Predictor._keep = keep_first  # type: ignore[method-assign]


def key_noise_by_time() -> None:
    draw = reference.draw_gumbel

    def draw_now(seed: int, *more: Any) -> torch.Tensor:
        return draw(seed + time.time_ns() % 1000, *more)

    reference.draw_gumbel = draw_now


DEFECTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "ties": break_ties,
    "membership": accept_strangers,
    "stale": keep_stale_blocks,
    "noise": key_noise_by_time,
}


def serve_all(servers: list[tuple[str, list[str]]]) -> None:
    children = []
    for defect, flags in servers:
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            DEFECTS[defect]()
            os._exit(main(flags))
        children.append(child)

    def end(*_: Any) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.pause()


if __name__ == "__main__":
    serve_all(json.loads(sys.argv[1]))
