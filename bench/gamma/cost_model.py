"""Which γ pays, and why: choices and predictions from measured points; pure.

A step with γ drafted tokens brings τ(γ) tokens and costs c(γ) plain steps, so that the speed-up is τ(γ) / c(γ). τ for
every γ follows from the acceptance per position at the largest one: 1 + Σ P(the first i tokens are accepted), i ≤ γ.
The cost is near a line: a fixed part, the drafter's pass, and a part per token, the drafted and the verified row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laguna_serve.bench.gamma.result import Choice, MeasuredPoint
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_ratio


@dataclass(frozen=True, slots=True)
class Point:
    """One γ at one concurrency. `pairs` are the rounds of its A/B, `step_cost` is in plain steps.

    `slack`: the least factor that a drift leaves of a ratio to this one.
    """

    gamma: int
    concurrency: int
    speedup: float
    ci95: tuple[float, float]
    tau: float
    per_position: tuple[float, ...]
    step_cost: float
    pairs: tuple[RoundPair, ...]
    slack: float = 1.0

    @classmethod
    def of(cls, measured: MeasuredPoint) -> Point:
        """Take what the model needs of a measurement."""
        return cls(
            measured.gamma,
            measured.concurrency,
            measured.speedup,
            measured.ci95,
            measured.tau,
            tuple(measured.per_position),
            measured.step_cost,
            tuple(measured.pairs),
            measured.drift.reach[0] if measured.drift else 1.0,
        )


@dataclass(frozen=True, slots=True)
class CostModel:
    """c(γ) = 1 + fixed + per_token · γ, in plain steps; `profile[i]`: P(the first i + 1 tokens are accepted)."""

    fixed: float
    per_token: float
    profile: tuple[float, ...]

    def tau(self, gamma: int) -> float:
        """Predicted tokens per speculative step with this γ, the target's own included."""
        return 1 + sum(self.profile[:gamma])

    def cost(self, gamma: int) -> float:
        """Plain steps per step."""
        return 1 + self.fixed + self.per_token * gamma

    def speedup(self, gamma: int) -> float:
        """Predicted tok/s over plain decoding's."""
        return self.tau(gamma) / self.cost(gamma)


def choose_gamma(points: Sequence[Point], seed: int) -> Choice:
    """Choose the γ of one concurrency: the best by the lower end of its interval.

    Of those that do not differ from it, the smallest. Plain decoding where no lower end is above 1.
    """
    concurrency = points[0].concurrency
    paying = [point for point in points if point.ci95[0] > 1]
    if not paying:
        best = max(points, key=lambda point: point.ci95[0])
        return Choice(concurrency, 0, f"no γ is faster for certain: the best is {best.gamma} with {_show(best)}")
    best = max(paying, key=lambda point: point.ci95[0])
    for point in sorted(paying, key=lambda point: point.gamma):
        if point.gamma >= best.gamma:
            break
        low, high = bootstrap_ratio(best.pairs, point.pairs, seed)
        if low * min(best.slack, point.slack) <= 1:
            reason = f"{_show(point)}; {best.gamma} is no different ({low:.2f}–{high:.2f} times this)"
            return Choice(concurrency, point.gamma, reason)
    return Choice(concurrency, best.gamma, _show(best))


def make_schedule(choices: Sequence[Choice]) -> list[tuple[int, int, int]]:
    """vLLM's `num_speculative_tokens_per_batch_size`: inclusive ranges of batch sizes from 1 on.

    A concurrency's γ holds from the one before it, exclusive; vLLM carries the last range on. Equal neighbours are
    joined.
    """
    schedule: list[tuple[int, int, int]] = []
    first = 1
    for choice in sorted(choices, key=lambda choice: choice.concurrency):
        if schedule and schedule[-1][2] == choice.gamma:
            schedule[-1] = (schedule[-1][0], choice.concurrency, choice.gamma)
        else:
            schedule.append((first, choice.concurrency, choice.gamma))
        first = choice.concurrency + 1
    return schedule


def fit_costs(points: Sequence[Point]) -> CostModel:
    """Least squares over the points of one concurrency; one point alone gives the fixed part."""
    largest = max(points, key=lambda point: point.gamma)
    if len(points) == 1:
        return CostModel(largest.step_cost - 1, 0.0, largest.per_position)
    gammas = np.array([point.gamma for point in points], dtype=np.float64)
    costs = np.array([point.step_cost for point in points])
    slope, intercept = np.polyfit(gammas, costs, 1)
    return CostModel(float(intercept) - 1, float(slope), largest.per_position)


def _show(point: Point) -> str:
    return f"{point.speedup:.2f}× ({point.ci95[0]:.2f}–{point.ci95[1]:.2f})"
