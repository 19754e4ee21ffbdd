"""How many of a draft's tokens will be accepted? Estimates by position, shared and for each request; pure.

Position k is tried only where all before it were accepted: what is estimated is the chance of that try, and the chance
that k tokens are accepted is the product of the first k. The shared estimate forgets, by drafts and by steps: while
few drafts are made, the few of late are what is known, and the estimate follows them quickly. A request has one factor
on all positions, its successes over those expected of it, which it loses again while it is not drafted for.
"""

from __future__ import annotations

import math

# Drafts, and steps, after which what was seen weighs a third.
MEMORY_DRAFTS, MEMORY_STEPS = 300.0, 3000.0
# Of a position that was never tried: as the one before it, the first like this, with the weight of so many tries.
UNKNOWN, UNKNOWN_TRIES = 0.7, 2.0
# A request's own: drafts, and steps without, after which they weigh a third; the shared estimate is worth so many
# successes beside them.
MEMORY_OWN, MEMORY_IDLE = 24.0, 200.0
SHARED_SUCCESSES = 32.0
MOST = 0.98
# Factors are rounded to powers of this, so that requests share their products.
FACTOR_STEP = math.log(1.06)


class Acceptance:
    """The shared estimate, for requests that are sampled alike."""

    def __init__(self, width: int) -> None:
        self.tries = [0.0] * width
        self.successes = [0.0] * width
        self.chances = [UNKNOWN] * width
        self._sums = [0.0] * (width + 1)
        self._survivals: dict[tuple[int, int], list[float]] = {}
        self._step = 0
        self._estimate()

    def observe(self, drafts: list[tuple[int, int]], step: int) -> None:
        """Take in the (drafted, accepted) tokens of some requests, in a step with this number."""
        keep = (1 - 1 / MEMORY_DRAFTS) ** len(drafts) * (1 - 1 / MEMORY_STEPS) ** (step - self._step)
        self._step = step
        self.tries = [tries * keep for tries in self.tries]
        self.successes = [successes * keep for successes in self.successes]
        for drafted, accepted in drafts:
            for position in range(accepted):
                self.tries[position] += 1
                self.successes[position] += 1
            if accepted < drafted:
                self.tries[accepted] += 1
        self._estimate()

    def expect(self, drafted: int, accepted: int) -> float:
        """Return the successes that were to be expected of the tries of such a draft."""
        return self._sums[min(accepted + 1, drafted)]

    def survivals(self, factor: int, room: int) -> list[float]:
        """Return for each number of tokens, from 1 on, the chance that all are accepted and of use; not to be changed.

        `factor`: the request's, rounded; `room`: the most tokens that it has a use for, 0 to the width. It is the same
        list for the same of both, until something is observed.
        """
        survivals = self._survivals.get((factor, room))
        if survivals is None:
            scale, survival, survivals = math.exp(factor * FACTOR_STEP), 1.0, [0.0] * len(self.chances)
            for position in range(room):
                survival *= min(MOST, self.chances[position] * scale)
                survivals[position] = survival
            self._survivals[factor, room] = survivals
        return survivals

    def _estimate(self) -> None:
        chance, total = UNKNOWN, 0.0
        for position, (tries, successes) in enumerate(zip(self.tries, self.successes, strict=True)):
            chance = (successes + UNKNOWN_TRIES * chance) / (tries + UNKNOWN_TRIES)
            total += chance
            self.chances[position] = chance
            self._sums[position + 1] = total
        self._survivals.clear()


class OwnAcceptance:
    """What one request's drafts came to, against the shared estimate."""

    __slots__ = ("drafted_at", "expected", "shared", "successes")

    def __init__(self, shared: Acceptance) -> None:
        self.shared = shared
        self.expected = self.successes = 0.0
        self.drafted_at = -1

    def observe(self, drafted: int, accepted: int) -> None:
        """Take in a verified draft, before the shared estimate does."""
        keep = 1 - 1 / MEMORY_OWN
        self.expected = self.expected * keep + self.shared.expect(drafted, accepted)
        self.successes = self.successes * keep + accepted

    def find_factor(self, step: int) -> int:
        """Return the request's factor, as a power of FACTOR_STEP's base."""
        if not self.expected:
            return 0
        idle = step - self.drafted_at - 2  # drafted for, verified, decided: no step without
        weight = math.exp(-idle / MEMORY_IDLE) if idle > 0 else 1.0
        factor = (self.successes * weight + SHARED_SUCCESSES) / (self.expected * weight + SHARED_SUCCESSES)
        return round(math.log(factor) / FACTOR_STEP)
