"""How many tokens are drafted for each request of the next step: the number that commits the most per second; pure.

For every width of the drafter's pass, tokens whose chance of being accepted is worth their row are drafted, and the
width with the largest rate, expected tokens over expected time, is taken; none where that is plain decoding's.  What is
not done is not learnt about, so that now and then a step is spent on the full width, or on none.  A purse pays for it:
a small part of all time goes into it, and such a step is taken when the purse holds what it is expected to lose.

**What comes out does not depend on this.**  Each number is fixed before its drafts are drawn, from earlier steps alone:
their accepted counts and their times.  Given the tokens so far, the drafts and their number, rejection sampling emits
tokens of the target's distribution, whatever the number (0 is plain sampling); and greedy tokens are the target's own.
A number chosen by looking at the drafts themselves, their probabilities for instance, would still be sound by that
argument, but one that looked at which of them are accepted would not: keep it that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from laguna_serve.plugins.adaptive.acceptance import Acceptance, OwnAcceptance
from laguna_serve.plugins.adaptive.costs import FIRST, StepCosts, read

# Of all time, for steps that are expected to lose.
EXPLORED = 0.005
# Drafts must be expected to bring so much more than plain decoding.
MARGIN = 0.01
# Steps between two of a kind that are not the best, at least; requests that such a step drafts for, at most.
LEAST_BETWEEN = 8
MOST_EXPLORED = 8
# Steps without drafts that follow a decision for none, as long as the batch stays the same.
PLAIN_RUN = 16
# What the purse may hold, in steps' worth of loss.
MOST_SAVED = 4.0


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


@dataclass(slots=True)
class Policy:
    """Decides for batches of requests, each named by its key, and learns of the steps that came of it.

    `width`: the most tokens that may be drafted.
    """

    width: int
    costs: StepCosts = field(init=False)
    _shared: dict[object, Acceptance] = field(default_factory=dict)
    _own: dict[str, OwnAcceptance] = field(default_factory=dict)
    _step: int = 0
    _purse: float = 0.0
    _full_at: int = 0
    _plain_at: int = 0
    # Of the last decision: requests, steps for which it holds, expected seconds.
    _held: tuple[int, int, float] = (0, 0, 0.0)
    # Least chance that a row is worth.
    _least: float = 0.0

    def __post_init__(self) -> None:
        self.costs = StepCosts(self.width)

    def add(self, request: str, kind: object) -> None:
        """Get to know a request; those of one kind (their temperature, say) share what is known."""
        shared = self._shared.setdefault(kind, Acceptance(self.width))
        self._own[request] = OwnAcceptance(shared)

    def drop(self, request: str) -> None:
        """Forget a request that has ended; one that is not known is no error."""
        self._own.pop(request, None)

    def observe_drafts(self, drafts: Sequence[tuple[str, int, int]]) -> None:
        """Learn of a step's (request, drafted, accepted)."""
        by_kind: dict[int, tuple[Acceptance, list[tuple[int, int]]]] = {}
        for request, drafted, accepted in drafts:
            own = self._own.get(request)
            if own is not None and drafted:
                own.observe(drafted, accepted)
                by_kind.setdefault(id(own.shared), (own.shared, []))[1].append((drafted, accepted))
        for shared, counts in by_kind.values():
            shared.observe(counts, self._step)
        if by_kind:
            self._held = (0, 0, 0.0)

    def observe_step(self, requests: int, drafted: int, target_s: float, width: int, drafter_s: float) -> None:
        """Learn what a step took; arguments as of `StepCosts.observe`."""
        self.costs.observe(requests, drafted, target_s, width, drafter_s)

    def decide(self, requests: Sequence[str], waiting_s: float = 0.0) -> Decision:
        """Decide for the requests of the next step, all of which decode.

        `waiting_s`: what must be made up first, once, where something is drafted.
        """
        self._step += 1
        held, left, seconds = self._held
        if left and held == len(requests):
            self._held = (held, left - 1, seconds)
            self._purse += EXPLORED * seconds
            self._plain_at = self._step
            return PLAIN
        return self._weigh(requests, waiting_s) if requests else PLAIN

    def _weigh(self, requests: Sequence[str], waiting_s: float) -> Decision:
        count = len(requests)
        verify, draft = self.costs.verify.curve(count), self.costs.find_draft_curve(count)
        survivals = self._find_survivals(requests)
        groups: dict[int, tuple[list[float], int]] = {}  # requests of the same chances
        for each in survivals:
            groups[id(each)] = (each, groups.get(id(each), (each, 0))[1] + 1)
        best, rate, seconds = 0, count / verify[0], verify[0]
        floor, least = rate * (1 + MARGIN), self._least
        gained, drafted = 0.0, 0
        for width in range(1, self.width + 1):
            for each, alike in groups.values():
                if each[width - 1] >= least:
                    gained += each[width - 1] * alike
                    drafted += alike
            if not drafted:
                break
            time = read(verify, drafted / count) + draft[width]
            if (count + gained) / time > max(rate, floor):
                best, rate, seconds = width, (count + gained) / time, time
        if self.width > 1:
            self._least = rate * (verify[-1] - verify[1]) / (self.width - 1) / count
        self._purse = min(self._purse + EXPLORED * seconds, MOST_SAVED * (verify[-1] + draft[-1]) + waiting_s)
        decision = self._explore(requests, survivals, best, rate, waiting_s)
        if decision is None and best:
            counts = {key: sum(chance >= least for chance in each[:best]) for key, (each, _) in groups.items()}
            decision = Decision(best, tuple(counts[id(each)] for each in survivals))
        elif decision is None:
            decision = PLAIN
            self._held = (count, PLAIN_RUN - 1, verify[0])
        self._note(requests, decision)
        return decision

    def _find_survivals(self, requests: Sequence[str]) -> list[list[float]]:
        """Each request's chances of so many tokens; the same list for the same chances."""
        survivals = []
        for request in requests:
            own = self._own[request]
            survivals.append(own.shared.survivals(own.find_factor(self._step)))
        return survivals

    def _note(self, requests: Sequence[str], decision: Decision) -> None:
        """Keep when what was done last."""
        if decision.width == 0:
            self._plain_at = self._step
        elif decision.width == self.width:
            self._full_at = self._step
        for request, drafts in zip(requests, decision.counts, strict=False):
            if drafts:
                self._own[request].drafted_at = self._step

    def _explore(
        self, requests: Sequence[str], survivals: Sequence[Sequence[float]], best: int, rate: float, waiting_s: float
    ) -> Decision | None:
        """Take the full width for those that were not drafted for longest, no drafts, or a width whose cost is unknown.

        None where the purse does not pay for what is due.
        """
        count = len(requests)
        verify, draft = self.costs.verify.curve(count), self.costs.find_draft_curve(count)
        if best < self.width and self._step - self._full_at >= LEAST_BETWEEN:
            oldest = sorted(range(count), key=lambda index: self._own[requests[index]].drafted_at)[:MOST_EXPLORED]
            drafted = len(oldest) * self.width
            expected = count + sum(sum(survivals[index]) for index in oldest)
            if self._pay(read(verify, drafted / count) + draft[self.width] + waiting_s - expected / rate):
                chosen = set(oldest)
                return Decision(self.width, tuple(self.width * (index in chosen) for index in range(count)))
        if best and self._step - self._plain_at >= LEAST_BETWEEN and self._pay(verify[0] - count / rate):
            return PLAIN
        for width in range(1, self.width):
            if self.costs.draft.count(count, width) >= FIRST and self.costs.verify.count(count, width):
                continue
            expected = count + sum(sum(each[:width]) for each in survivals)
            hoped = verify[0] + (verify[-1] - verify[0]) * width / self.width
            hoped += draft[-1] * (width + 1) / (self.width + 1)
            if expected / hoped > rate and self._pay(verify[width] + draft[width] - expected / rate):
                return Decision(width, (width,) * count)
        return None

    def _pay(self, loss: float) -> bool:
        if loss > self._purse:
            return False
        self._purse -= max(loss, 0.0)
        return True
