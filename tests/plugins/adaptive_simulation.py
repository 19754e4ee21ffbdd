"""A simulated engine for the policy: acceptance by position, times with noise and outliers; no clock, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from laguna_serve.plugins.adaptive.policy import Policy

WIDTH = 7
Chances = Sequence[float]


def verify_s(requests: int, drafted: int) -> float:
    """A step of the toy teacher's shape: mostly fixed, dearer with a drafter, a little per row."""
    base = 2.3 + 0.35 * requests
    return (base * (1.3 if drafted else 1) + 0.09 * drafted) * 1e-3


def draft_s(requests: int, width: int) -> float:
    """The drafter's pass, over 1 + width rows per request."""
    return (1 + 0.05 * requests * (1 + width)) * 1e-3 if width else 0.0


@dataclass
class Simulation:
    """Requests that accept position k of a draft with `chances[k]` where all before it were; each is `length` long.

    `slow`: a factor on all times by step, the same for every policy; `waiting_s`: what a first draft has to make up.
    """

    chances: Callable[[int, int], Chances]
    requests: int = 1
    seed: int = 0
    length: int = 96
    slow: Callable[[int], float] = lambda _step: 1.0
    waiting_s: float = 0.0
    widths: list[int] = field(default_factory=list)

    def run(self, steps: int, policy: Policy | None = None, fixed: int = 0) -> float:
        """Tokens per second over so many steps, of a policy or of a fixed γ."""
        draw = random.Random(self.seed)

        def take(seconds: float) -> float:
            return seconds * math.exp(draw.gauss(0, 0.05)) * (draw.uniform(1.5, 6) if draw.random() < 0.01 else 1)

        numbers, left, counts, made = list(range(self.requests)), [self.length] * self.requests, {}, self.requests
        width, tokens, time = 0, 0, 0.0
        for number in numbers:
            self._add(policy, number)
        for step in range(steps):
            drafted, seen = sum(counts.values()), []
            target_s = take(verify_s(self.requests, drafted) * self.slow(step))
            for place, number in enumerate(numbers):
                count, accepted = counts.get(number, 0), 0
                while accepted < count and draw.random() < self.chances(step, number)[accepted]:
                    accepted += 1
                seen.append((str(number), count, accepted))
                tokens += accepted + 1
                left[place] -= accepted + 1
            if policy is not None:
                policy.observe_drafts(seen)
            for place in (place for place, rest in enumerate(left) if rest <= 0):
                if policy is not None:
                    policy.drop(str(numbers[place]))
                numbers[place], left[place], made = made, self.length, made + 1
                self._add(policy, numbers[place])
            if policy is not None:
                decision = policy.decide([str(number) for number in numbers], self.waiting_s)
                width, counts = decision.width, dict(zip(numbers, decision.counts, strict=False))
            else:
                width, counts = fixed, dict.fromkeys(numbers, fixed)
            pass_s = take(draft_s(self.requests, width) * self.slow(step))
            if policy is not None:
                policy.observe_step(self.requests, drafted, target_s, width, pass_s)
            self.widths.append(width)
            time += target_s + pass_s
        return tokens / time

    def _add(self, policy: Policy | None, number: int) -> None:
        if policy is not None:
            policy.add(str(number), 0)

    def best(self, steps: int) -> tuple[int, float]:
        """The fixed γ with the largest rate, and that."""
        rates = {
            gamma: Simulation(self.chances, self.requests, self.seed + 1, self.length, self.slow).run(
                steps, fixed=gamma
            )
            for gamma in range(WIDTH + 1)
        }
        return max(rates.items(), key=lambda item: item[1])
