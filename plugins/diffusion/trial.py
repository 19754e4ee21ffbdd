"""Whether proposals pay on this machine: a decode with them and one without take turns for a few seconds.

A proposal costs rows, and a draft its own passes; what comes back depends on the model, the texts and the machine. On
two processor cores rows are never free, on a GPU a block's first few states nearly are. The tokens are the same either
way, so that the decision changes nothing but the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation

TURNS = 4


@dataclass(frozen=True, slots=True)
class Trial:
    """Steps of the reference per second with proposals ÷ without, and per pass of the target with them."""

    speedup: float
    steps_per_pass: float

    @property
    def pays(self) -> bool:
        """Whether it is faster with them."""
        return self.speedup > 1

    def __str__(self) -> str:
        return f"{self.speedup:.2f} times as fast as without, {self.steps_per_pass:.2f} steps per pass"


def try_speculation(
    predictor: Predictor,
    reference: Reference,
    speculation: Speculation,
    canvases: Sequence[Canvas],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Decode canvases with and without proposals in turns, for about `seconds` in all and at least a pass a turn.

    Args:
        predictor: its counters of passes and rows are left as they were.
        canvases: at least one; begun again when all are done.
        clock: seconds.
    """
    passes, rows = predictor.passes, predictor.rows
    arms = [_Arm(Decoder(predictor, reference, (), made), canvases) for made in (None, speculation)]
    for arm in arms:
        arm.advance()  # what is made once is not timed
    for _ in range(TURNS):
        for arm in arms:
            arm.work(seconds / TURNS / len(arms), clock)
    predictor.passes, predictor.rows = passes, rows
    plain, proposed = arms
    return Trial(proposed.steps / proposed.seconds / (plain.steps / plain.seconds), proposed.steps / proposed.passes)


class _Arm:
    """One of the two decodes, one canvas after the other."""

    def __init__(self, decoder: Decoder, canvases: Sequence[Canvas]) -> None:
        self.steps = self.passes = 0
        self.seconds = 0.0
        self._decoder = decoder
        self._canvases = cycle(canvases)
        self._run = decoder.begin(next(self._canvases))

    def advance(self) -> int:
        """Run a pass; the steps that it brought."""
        if self._run.find_end() is not None:
            self._run = self._decoder.begin(next(self._canvases))
        before = self._run.steps
        self._decoder.advance([self._run])
        return self._run.steps - before

    def work(self, seconds: float, clock: Callable[[], float]) -> None:
        """Run passes until the time is over."""
        began = clock()
        while True:
            self.steps += self.advance()
            self.passes += 1
            if (now := clock()) - began >= seconds:
                break
        self.seconds += now - began
