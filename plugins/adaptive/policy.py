"""How many tokens are drafted for each request of the next step: the number that commits the most per second; pure.

For every width of the drafter's pass, tokens whose chance of being accepted is worth their row are drafted, and the
width with the largest rate, expected tokens over expected time, is taken; none where that is plain decoding's. To that
time belongs the drafter's context of the prompts, shared out among the tokens of as long answers as there were of late:
where prompts are most of the work it may cost more than drafts bring.

What is not done is not learnt about, so that now and then a step is spent on the full width, or on none. A purse pays
for it: a small part of all time goes into it, more in the beginning, when a cold machine's steps say little, and such a
step is taken when the purse holds what it is expected to lose. A number of requests that never was, nor one near it,
begins without drafts, which loses little; an engine's first drafts for a request or two are on the full width, as cold
steps say little.

**What comes out does not depend on this.**  Each number is fixed before its drafts are drawn, from earlier steps alone:
their accepted counts, their times, and how many tokens a request may still get. Given the tokens so far, the drafts
and their number, rejection sampling emits tokens of the target's distribution, whatever the number (0 is plain
sampling); and greedy tokens are the target's own. A number chosen by looking at the drafts themselves, their
probabilities for instance, would still be sound by that argument, but one that looked at which of them are accepted
would not: keep it that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from laguna_serve.plugins.adaptive.acceptance import Acceptance, OwnAcceptance
from laguna_serve.plugins.adaptive.costs import FIRST, Measured, StepCosts, find_bucket
from laguna_serve.plugins.adaptive.prospect import PLAIN, Decision, Prospect, count_alike
from laguna_serve.plugins.adaptive.rows import round_rows

# Of all time, for steps that are expected to lose; in the beginning more: this many steps' time divided by the steps
# so far, and no more than that.
EXPLORED, EXPLORED_EARLY, EXPLORED_FIRST = 0.005, 8.0, 0.015
# Drafts must be expected to bring so much more than plain decoding.
MARGIN = 0.02
# Steps with drafts in which the context that must be made up before the first of them is to be paid back.
REPAID = 16
# Steps between two of a kind that are not the best: so many for each that was measured, from this to that; requests
# that such a step drafts for, at most.
LEAST_BETWEEN, EACH_BETWEEN, MOST_BETWEEN = 8, 4, 64
MOST_EXPLORED = 8
# First steps of so many requests at most, which draft.
WARM, WARM_REQUESTS = 10, 2
# Steps without drafts that follow a decision for none, as long as the requests stay the same.
PLAIN_RUN = 16
# What the purse may hold, in steps' worth of loss.
MOST_SAVED = 4.0
# Requests that have ended after which one weighs a third.
MEMORY_ENDED = 128.0
# No row is worth less of a chance.
LEAST_CHANCE = 1e-6


@dataclass(slots=True)
class Policy:
    """Decides for batches of requests, each named by its key, and learns of the steps that came of it.

    `width`: the most tokens that may be drafted.
    """

    width: int
    # Seconds for the context of a token, as far as known from elsewhere.
    row_s: float = 0.0
    costs: StepCosts = field(init=False)
    _shared: dict[object, Acceptance] = field(default_factory=dict)
    _own: dict[str, OwnAcceptance] = field(default_factory=dict)
    _step: int = 0
    _warmed: int = 0
    _purse: float = 0.0
    _full_at: int = 0
    _plain_at: int = 0
    # Of the last decision: requests, steps for which it holds, expected seconds.
    _held: tuple[tuple[str, ...], int, float] = ((), 0, 0.0)
    # Least chance that a row is worth.
    _least: float = LEAST_CHANCE
    # Of requests that have ended: tokens of their prompts, as far as drafts alone need their context, and of answers.
    _prompts: float = 0.0
    _answers: float = 0.0
    # Decisions by the number of requests' bucket.
    _begun: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = StepCosts(self.width)

    def add(self, request: str, kind: object) -> None:
        """Get to know a request; those of one kind (their temperature, say) share what is known."""
        if kind not in self._shared:
            self._shared[kind] = Acceptance(self.width)
        self._own[request] = OwnAcceptance(self._shared[kind])

    def drop(self, request: str, prompt: int = 0, tokens: int = 0) -> None:
        """Forget a request that has ended, after so many tokens of its own; one that is not known is no error.

        `prompt`: the tokens of its prompt whose context is made for drafts alone.
        """
        self._own.pop(request, None)
        if tokens:
            keep = 1 - 1 / MEMORY_ENDED
            self._prompts, self._answers = self._prompts * keep + prompt, self._answers * keep + tokens

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
            self._held = ((), 0, 0.0)

    def observe_step(self, step: Measured) -> None:
        """Learn what a step took."""
        self.costs.observe(step)

    def decide(self, requests: Sequence[str], waiting_s: float = 0.0, room: Sequence[int] | None = None) -> Decision:
        """Decide for the requests of the next step, all of which decode.

        `waiting_s`: what must be made up first, once, where something is drafted; `room`: the most drafts that each
        request has a use for before its end.
        """
        if self.repeat_plain(requests):
            return PLAIN
        self._step += 1
        if not requests or self._begins(len(requests)):
            self._plain_at = self._step
            return PLAIN
        decision = self._warm_up(requests, room)
        return self._weigh(self._look(requests, waiting_s, room)) if decision is None else decision

    def repeat_plain(self, requests: Sequence[str]) -> bool:
        """Take the last decision, for no drafts, again where it still holds for these requests; say whether it does."""
        held, left, seconds = self._held
        if not left or held != tuple(requests):
            return False
        self._step += 1
        self._held = (held, left - 1, seconds)
        self._purse += self._share * seconds
        self._plain_at = self._step
        return True

    def _warm_up(self, requests: Sequence[str], room: Sequence[int] | None) -> Decision | None:
        """Take the full width in an engine's first steps of few requests: what cold ones take says little."""
        if self._warmed == WARM or len(requests) > WARM_REQUESTS:
            return None
        decision = Decision(self.width, tuple(min(self.width, most) for most in room or [self.width] * len(requests)))
        if not decision.total:
            return None
        self._warmed += 1
        self._note(requests, decision)
        return decision

    @property
    def _share(self) -> float:
        """What part of the time goes into the purse."""
        return max(EXPLORED, min(EXPLORED_FIRST, EXPLORED_EARLY / self._step))

    def _begins(self, count: int) -> bool:
        """Whether so many requests are new here, and what a plain step of about as many takes is not known yet."""
        bucket = find_bucket(count)
        begun = self._begun[bucket] = self._begun.get(bucket, 0) + 1
        return begun <= FIRST and not self.costs.verify.is_known_near(count)

    def _look(self, requests: Sequence[str], waiting_s: float, room: Sequence[int] | None) -> Prospect:
        row_s = self.costs.draft.rate.value or self.row_s / self.costs.pace
        survivals = self._find_survivals(requests, room)
        return Prospect(
            requests,
            survivals,
            count_alike(survivals),
            self.costs.verify.curve(len(requests)),
            self.costs.find_draft_curve(len(requests)),
            row_s * self._prompts / self._answers if self._answers else 0.0,
            waiting_s / self.costs.pace,
        )

    def _find_survivals(self, requests: Sequence[str], room: Sequence[int] | None) -> list[list[float]]:
        """Each request's chances of so many tokens, 0 beyond its room; the same list for the same chances."""
        own = [self._own[request] for request in requests]
        rooms = [self.width] * len(own) if room is None else [max(0, min(most, self.width)) for most in room]
        return [
            each.shared.survivals(each.find_factor(self._step), most) for each, most in zip(own, rooms, strict=True)
        ]

    def _weigh(self, prospect: Prospect) -> Decision:
        verify, count = prospect.verify, len(prospect.requests)
        least = self._least
        best, rate, seconds = self._find_best(prospect, least)
        if self.width > 1:
            # Not by the widest: one that seems dear, perhaps for no reason, would make rows of all others dear.
            slopes = [(verify[width] - verify[1]) / (width - 1) for width in range(2, self.width + 1)]
            slope = (slopes[best - 2] if best > 1 else sorted(slopes)[len(slopes) // 3]) / count
            self._least = max(LEAST_CHANCE, rate * slope / max(0.1, 1 - rate * prospect.context_s))
        most = MOST_SAVED * (verify[-1] + prospect.draft[-1]) + prospect.waiting_s
        self._purse = min(self._purse + self._share * seconds, most)
        decision = self._explore(prospect, best, rate)
        if decision is None and best:
            counts = {id(each): sum(chance >= least for chance in each[:best]) for each, _ in prospect.alike}
            decision = Decision(best, round_rows([counts[id(each)] for each in prospect.survivals]))
        elif decision is None:
            decision = PLAIN
            self._held = (tuple(prospect.requests), PLAIN_RUN - 1, verify[0])
        self._note(prospect.requests, decision)
        return decision

    def _find_best(self, prospect: Prospect, least: float) -> tuple[int, float, float]:
        """Find the width with the largest rate, of rows with a chance of at least `least`; that rate; and its time."""
        tokens, drafted = float(len(prospect.requests)), 0
        best, seconds = 0, prospect.verify[0]
        rate = tokens / seconds
        floor = rate * (1 + MARGIN)
        for width in range(1, self.width + 1):
            for each, number in prospect.alike:
                if each[width - 1] >= least:
                    tokens += each[width - 1] * number
                    drafted += number
            if not drafted:
                break
            time = prospect.time(width, drafted)
            reached = prospect.rate(tokens, time + prospect.waiting_s / REPAID)
            if reached > max(rate, floor):
                best, rate, seconds = width, reached, time
        return best, rate, seconds

    def _note(self, requests: Sequence[str], decision: Decision) -> None:
        """Keep when what was done last."""
        if decision.width == 0:
            self._plain_at = self._step
        elif decision.width == self.width:
            self._full_at = self._step
        for request, drafts in zip(requests, decision.counts, strict=False):
            if drafts:
                self._own[request].drafted_at = self._step

    def _explore(self, prospect: Prospect, best: int, rate: float) -> Decision | None:
        """Decide for what is not the best where it is due and paid for: the full width, none, or an unknown one."""
        count = len(prospect.requests)
        due = best < self.width and self._is_due(self._full_at, self.costs.draft.count(count, self.width))
        if due or (best and count > MOST_EXPLORED and not self.costs.draft.knows(count)):
            decision = self._explore_full(prospect, rate)
            if decision is not None:
                return decision
        due = best > 0 and self._is_due(self._plain_at, self.costs.verify.count(count, 0))
        if due and self._pay(prospect.verify[0] + count * prospect.context_s - count / rate):
            return PLAIN
        return self._explore_unknown(prospect, rate)

    def _is_due(self, done_at: int, measured: int) -> bool:
        return self._step - done_at >= max(LEAST_BETWEEN, min(MOST_BETWEEN, EACH_BETWEEN * measured))

    def _explore_full(self, prospect: Prospect, rate: float) -> Decision | None:
        """Take the full width for those that have room for it and were not drafted for longest."""
        requests, survivals = prospect.requests, prospect.survivals
        roomy = [index for index in range(len(requests)) if survivals[index][-1] > 0]
        oldest = set(sorted(roomy, key=lambda index: self._own[requests[index]].drafted_at)[:MOST_EXPLORED])
        tokens = len(requests) + sum(sum(survivals[index]) for index in oldest)
        time = prospect.time(self.width, len(oldest) * self.width)
        if not oldest or not self._pay(prospect.lose(tokens, time, rate)):
            return None
        return Decision(self.width, tuple(self.width * (index in oldest) for index in range(len(requests))))

    def _explore_unknown(self, prospect: Prospect, rate: float) -> Decision | None:
        """Take a width whose cost was hardly measured, and which may be the best if it costs as the others suggest."""
        count, verify, draft = len(prospect.requests), prospect.verify, prospect.draft
        for width in range(1, self.width):
            if self.costs.draft.count(count, width) >= FIRST and self.costs.verify.count(count, width):
                continue
            tokens = prospect.count_tokens(width)
            hoped = verify[0] + (verify[-1] - verify[0]) * width / self.width
            hoped = min(hoped, self.costs.verify.hope(count, width))
            hoped += draft[-1] * (width + 1) / (self.width + 1)
            if prospect.rate(tokens, hoped) <= rate:
                continue
            if self._pay(prospect.lose(tokens, verify[width] + draft[width], rate)):
                return Decision(width, tuple(sum(map(bool, each[:width])) for each in prospect.survivals))
        return None

    def _pay(self, loss: float) -> bool:
        if loss > self._purse:
            return False
        self._purse -= max(loss, 0.0)
        return True
