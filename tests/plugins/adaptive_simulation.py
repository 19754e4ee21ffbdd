"""A simulated engine for the policy: acceptance by position, times measured with noise and outliers; no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from laguna_serve.plugins.adaptive.costs import Measured
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


# A prompt token, in the target and, as context, in the drafter.
PROMPT_S, CONTEXT_S = 0.16e-3, 0.019e-3


@dataclass
class Load:
    """What is under way: requests by place with the tokens left to them, those that read their prompts, and drafts."""

    numbers: list[int]
    left: list[int]
    reading: set[int]
    counts: dict[int, int] = field(default_factory=dict)
    width: int = 0
    waiting: dict[int, int] = field(default_factory=dict)

    @property
    def decoding(self) -> list[int]:
        """Places of the requests that decode."""
        return [place for place in range(len(self.numbers)) if place not in self.reading]

    @property
    def drafted(self) -> int:
        """Drafted rows of the step."""
        return sum(self.counts.values())


@dataclass
class Simulation:
    """Requests that accept position k of a draft with `chances[k]` where all before it were.

    Each is `length` long, or up to `spread` more or less.
    `slow`: a factor on all times by step, the same for every policy; `waiting_s`: what a first draft has to make up;
    `prompt`: prompt tokens by request, read in one step in which the others decode, 0 for none; contexts then wait.
    """

    chances: Callable[[int, int], Chances]
    requests: int = 1
    seed: int = 0
    length: int = 96
    spread: int = 0
    slow: Callable[[int], float] = lambda _step: 1.0
    waiting_s: float = 0.0
    prompt: Callable[[int], int] = lambda _number: 0
    widths: list[int] = field(default_factory=list)

    def run(self, steps: int, policy: Policy | None = None, fixed: int = 0) -> float:
        """Tokens per second over so many steps, of a policy or of a fixed γ."""
        draw = random.Random(self.seed)

        def measure(seconds: float) -> float:
            return seconds * math.exp(draw.gauss(0, 0.05)) * (draw.uniform(1.5, 6) if draw.random() < 0.01 else 1)

        places = range(self.requests)
        load = Load(
            list(places), [self._long(place) for place in places], {place for place in places if self.prompt(place)}
        )
        made, tokens, time = self.requests, 0, 0.0
        for number in load.numbers:
            self._add(policy, number)
        for step in range(steps):
            read, slow = sum(self.prompt(load.numbers[place]) for place in load.reading), self.slow(step)
            decoding, drafted = len(load.decoding), load.drafted
            target_s = (verify_s(decoding, drafted) + PROMPT_S * read) * slow
            tokens += self._emit(load, step, draw, policy)
            self._decide(load, policy, fixed)
            pass_s = (draft_s(self.requests, load.width) + CONTEXT_S * read) * slow if load.width else 0.0
            time += target_s + pass_s + (CONTEXT_S * sum(load.waiting.values()) * slow if load.width else 0.0)
            self._keep(load, policy)
            if policy is not None:
                times = {"target_s": measure(target_s), "drafter_s": measure(pass_s)}
                measured = Measured(decoding, drafted, width=load.width, batch=self.requests, prompt=read, **times)
                policy.observe_step(self.measure_step(measured))
            load.reading.clear()
            for place in (place for place, rest in enumerate(load.left) if rest <= 0):
                self._end(load, place, made, policy)
                made += 1
            self.widths.append(load.width)
        return tokens / time

    def measure_step(self, step: Measured) -> Measured:
        """Return a step as it is measured."""
        return step

    def _emit(self, load: Load, step: int, draw: random.Random, policy: Policy | None) -> int:
        """Verify the drafts of those that decode, and give the first token to those that have read."""
        before, seen = sum(load.left), []
        for place in load.decoding:
            number = load.numbers[place]
            count, accepted = load.counts.get(number, 0), 0
            while accepted < count and draw.random() < self.chances(step, number)[accepted]:
                accepted += 1
            seen.append((str(number), count, accepted))
            load.left[place] -= accepted + 1
        for place in load.reading:
            load.left[place] -= 1
        if policy is not None:
            policy.observe_drafts(seen)
        return before - sum(max(0, rest) for rest in load.left)

    def _decide(self, load: Load, policy: Policy | None, fixed: int) -> None:
        """Decide for the next step; a fixed γ drafts for those that have ended, too."""
        numbers = load.numbers
        if policy is None:
            load.width, load.counts = fixed, dict.fromkeys(numbers, fixed)
            return
        places = [place for place, rest in enumerate(load.left) if rest > 0]
        room = [load.left[place] - 1 for place in places]
        if self.prompt(0):
            policy.row_s = CONTEXT_S
        rows = sum(load.waiting.values()) + sum(self.prompt(numbers[place]) for place in load.reading)
        waiting_s = self.waiting_s + CONTEXT_S * rows
        decision = policy.decide([str(numbers[place]) for place in places], waiting_s, room)
        load.width = decision.width
        load.counts = dict(zip((numbers[place] for place in places), decision.counts, strict=False))

    def _keep(self, load: Load, policy: Policy | None) -> None:
        """Let the context of the prompts wait where nothing is drafted."""
        if load.width or policy is None:
            load.waiting.clear()
        else:
            load.waiting |= {load.numbers[place]: self.prompt(load.numbers[place]) for place in load.reading}

    def _end(self, load: Load, place: int, number: int, policy: Policy | None) -> None:
        """Put a new request in the place of one that has ended, which drafts may not have been verified for."""
        old = load.numbers[place]
        load.counts.pop(old, None)
        load.waiting.pop(old, None)
        if policy is not None:
            policy.drop(str(old), self.prompt(old), self._long(old))
        load.numbers[place], load.left[place] = number, self._long(number)
        self._add(policy, number)
        if self.prompt(number):
            load.reading.add(place)

    def _long(self, number: int) -> int:
        return self.length - self.spread + number * 7919 % (2 * self.spread + 1)

    def _add(self, policy: Policy | None, number: int) -> None:
        if policy is not None:
            policy.add(str(number), 0)

    def best(self, steps: int) -> tuple[int, float]:
        """The fixed γ with the largest rate, and that."""
        rates = {
            gamma: replace(self, seed=self.seed + 1, widths=[]).run(steps, fixed=gamma) for gamma in range(WIDTH + 1)
        }
        return max(rates.items(), key=lambda item: item[1])
