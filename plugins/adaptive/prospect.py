"""What a next step may be, and what is decided for it: drafts by request, times, rates; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from laguna_serve.plugins.adaptive.costs import read


def count_alike(survivals: Sequence[Sequence[float]]) -> list[tuple[Sequence[float], int]]:
    """Return each list, by its identity, and how often it is there."""
    lists = {id(each): each for each in survivals}
    return [(lists[key], number) for key, number in Counter(map(id, survivals)).items()]


@dataclass(frozen=True, slots=True)
class Decision:
    """Tokens that the drafter's pass is made for, and how many of them each request gets; width 0: no pass."""

    width: int
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Drafted rows of the next step."""
        return sum(self.counts)


PLAIN = Decision(0, ())


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a next step is expected to be: each request's chances of so many tokens, and times, all at pace 1.

    `survivals`: the same list for the same chances; `alike`: each such list with the number of its requests; `verify`,
    `draft`: seconds by drafted tokens per request and by width; `context_s`: of the prompts' context, per token of the
    answers, where drafts are made; `waiting_s`: of what must be made up first, once.
    """

    requests: Sequence[str]
    survivals: Sequence[Sequence[float]]
    alike: Sequence[tuple[Sequence[float], int]]
    verify: Sequence[float]
    draft: Sequence[float]
    context_s: float
    waiting_s: float

    def count_tokens(self, width: int) -> float:
        """Return the tokens to be expected of a step in which each request has so many drafts, its own counted."""
        return len(self.requests) + sum(sum(each[:width]) * number for each, number in self.alike)

    def time(self, width: int, drafted: int) -> float:
        """Return the seconds of a step with so many drafted rows together, and of the pass before it."""
        return read(self.verify, drafted / len(self.requests)) + self.draft[width]

    def rate(self, tokens: float, seconds: float) -> float:
        """Return the tokens per second of steps that draft, with what their prompts' context takes."""
        return tokens / (seconds + tokens * self.context_s)

    def lose(self, tokens: float, seconds: float, rate: float) -> float:
        """Return what a step with drafts that is not the best loses against one at `rate`, in seconds."""
        return seconds + max(self.waiting_s, tokens * self.context_s) - tokens / rate
