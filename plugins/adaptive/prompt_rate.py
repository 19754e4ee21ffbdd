"""What does a prompt token cost? Learned from steps of one cell that read more and less of them; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEAN_MEMORY = 64  # steps
# Natural logarithm of the largest factor by which one measurement is believed to differ.
MOST_SURPRISE = 0.4
MOST_FACTOR = math.exp(MOST_SURPRISE)
# Steps with prompts after which what they say of a prompt token weighs a third; the square of how far prompts must have
# moved their steps' times, as a share of these, before it is believed.
PROMPT_MEMORY, LEAST_SWING = 128.0, 0.1


@dataclass(slots=True)
class Mean:
    """Means over a cell's steps with and without prompts: prompt tokens, and seconds at pace 1."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        self.steps = min(self.steps + 1, MEAN_MEMORY)
        self.tokens += (tokens - self.tokens) / self.steps
        self.seconds += (seconds - self.seconds) / self.steps


class PromptRate:
    """Seconds per prompt token, at pace 1: the slope of steps' times over their prompt tokens, within cells."""

    def __init__(self) -> None:
        self._means: dict[tuple[int, int], Mean] = {}
        self._square = self._product = 0.0
        self.value = 0.0

    def observe(self, requests: int, level: int, tokens: int, seconds: float) -> None:
        """Take in a step's seconds at pace 1; errors are shares of these, so that long steps weigh less."""
        mean = self._means.setdefault((requests, level), Mean())
        expected = seconds
        if self.value and mean.steps:
            expected = max(mean.seconds + self.value * (tokens - mean.tokens), mean.seconds / 8)
            seconds = max(expected / MOST_FACTOR, min(expected * MOST_FACTOR, seconds))
        more, longer = tokens - mean.tokens, seconds - mean.seconds
        if mean.steps and more:
            keep, weight = 1 - 1 / PROMPT_MEMORY, mean.steps / (mean.steps + 1) / max(expected, mean.seconds) ** 2
            self._square = self._square * keep + weight * more * more
            self._product = self._product * keep + weight * more * longer
            known = self._product > 0 and self._product**2 > LEAST_SWING * self._square
            self.value = self._product / self._square if known else 0.0
        mean.observe(tokens, seconds)
