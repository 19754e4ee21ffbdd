"""Do drafts pay for the load as a whole? Tokens per second over stretches with and without them, compared; pure.

What single steps cost does not say everything: with drafts no two answers end together, prompts are read one by one
that plain decoding reads at once, contexts are written between steps.  So the engine's work is cut into stretches of
about as many tokens as are answered in one turn of its requests, with the policy's drafts or without any, and each is
compared with the one of the other sort just before it: as near as can be, as the machine's pace changes, and as if both
had read as many prompt tokens for what they answered.  Loads differ by their number of requests, in powers of two.

The sort that is behind is tried again when it is paid for: a small part of all time goes into a purse, and a stretch
takes from it what it is expected to lose.  Before anything was compared, the gain is what the policy expects of its
steps.  A load begins with a stretch without drafts, which loses little whatever is true.  Few requests are not judged:
their steps say it all, and a stretch without drafts is half an answer to somebody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from laguna_serve.plugins.adaptive.costs import Measured

# Of all time, for stretches of the sort that is behind; one that is hardly behind counts as this much behind.
EXPLORED, LEAST_LOSS = 0.005, 0.02
# Tokens of a stretch: at least, and for each request as many as an answer has, between these.
LEAST_TOKENS, LEAST_EACH, MOST_EACH = 256, 16.0, 128.0
# Of a stretch after one of the other sort, and of a load's first one, as a share, what does not count: it writes what
# that one left, or uses it, and requests come together that do not later.
SKIPPED = 0.5
# Answers after which one weighs little in their mean length; comparisons in that of the gain.
MEMORY_ANSWERS, MEMORY_COMPARED = 64, 4
# Of a stretch's time, as a share, what its prompts leave at least.
LEAST_SHARE = 0.1
# Steps with drafts, as a share, without which a stretch is as good as one without any: nothing to forbid.
LEAST_DRAFTED = 0.1
# As far as one comparison is believed, in natural logarithms.
MOST_GAIN = 0.4
# So many requests at once are not judged.
FEW = 4


@dataclass(slots=True)
class Stretch:
    """Tokens that were answered, and seconds, with drafts where they seemed to pay or without any.

    `reading_s`: of these, what its prompts took, at what a token of theirs takes.
    """

    drafting: bool
    tried: bool = False  # though its sort is behind
    skipped: float = 0.0  # tokens that are yet to be left out
    tokens: int = 0
    seconds: float = 0.0
    reading_s: float = 0.0
    steps: int = 0
    drafted: int = 0  # steps with drafts

    def observe(self, step: Measured, reading_s: float) -> None:
        """Take in a step."""
        if self.skipped > 0:
            self.skipped -= step.tokens
            return
        self.tokens += step.tokens
        self.seconds += step.whole_s
        self.reading_s += reading_s
        self.steps += 1
        self.drafted += step.drafted > 0

    def answer_s(self, reading_s: float) -> float:
        """Return its seconds per token, had its prompts taken so much of each."""
        return max(self.seconds - self.reading_s, LEAST_SHARE * self.seconds) / self.tokens + reading_s


@dataclass(slots=True)
class Load:
    """What is known of about so many requests at once: the gain of drafts (natural logarithm of the speed-up)."""

    stretch: Stretch
    before: Stretch | None = None
    gain: float = 0.0
    compared: int = 0
    purse: float = 0.0


@dataclass(slots=True)
class Judge:
    """Says for each number of requests whether the policy may draft, and learns of all steps."""

    _loads: dict[int, Load] = field(default_factory=dict)
    _last: int = 0
    _answers: int = 0
    _length: float = LEAST_EACH

    def allows(self, requests: int) -> bool:
        """Whether drafts may be made for so many requests now."""
        return requests <= FEW or self._find(requests).stretch.drafting

    def expect(self, requests: int, gain: float) -> None:
        """Take in what the policy expects drafts to gain, which holds until something was compared."""
        if requests > FEW and not (load := self._find(requests)).compared:
            load.gain = gain

    def end_answer(self, tokens: int) -> None:
        """Take in how long an answer was."""
        self._answers = min(self._answers + 1, MEMORY_ANSWERS)
        self._length += (tokens - self._length) / self._answers

    def observe(self, step: Measured, reading_s: float) -> None:
        """Take in a step, and what its prompts took of it; one of prompts alone belongs to the load before it."""
        self._last = step.requests or self._last
        if self._last <= FEW:
            return
        load = self._find(self._last)
        load.purse += EXPLORED * step.whole_s
        load.stretch.observe(step, reading_s)
        if load.stretch.tokens >= self._find_turn(self._last):
            _turn(load)

    def _find(self, requests: int) -> Load:
        power = (requests - 1).bit_length()
        load = self._loads.get(power)
        if load is None:
            load = Load(Stretch(drafting=False, skipped=SKIPPED * self._find_turn(requests)))
            self._loads[power] = load
        return load

    def _find_turn(self, requests: int) -> float:
        """Find the tokens of a stretch."""
        return max(LEAST_TOKENS, requests * min(MOST_EACH, max(LEAST_EACH, self._length)))


def _turn(load: Load) -> None:
    """Compare the stretch that has ended with the one before, pay for it, and begin the next."""
    ended, before = load.stretch, load.before
    if ended.drafting and ended.drafted < LEAST_DRAFTED * ended.steps:
        load.before, load.stretch = None, Stretch(drafting=True)
        return
    if before is not None and before.drafting != ended.drafting:
        reading_s = (ended.reading_s + before.reading_s) / (ended.tokens + before.tokens)
        longer = math.log(ended.answer_s(reading_s) / before.answer_s(reading_s))
        if ended.tried:
            load.purse -= _lose(ended.seconds, -max(LEAST_LOSS, longer))
        gain = max(-MOST_GAIN, min(MOST_GAIN, -longer if ended.drafting else longer))
        load.compared += 1
        load.gain += (gain - load.gain) / min(load.compared, MEMORY_COMPARED)
    ahead = load.gain >= 0
    tried = ended.drafting == ahead and _lose(ended.seconds, max(LEAST_LOSS, abs(load.gain))) <= load.purse
    drafting = ahead != tried
    skipped = SKIPPED * ended.tokens if drafting != ended.drafting else 0.0
    load.before, load.stretch = ended, Stretch(drafting, tried, skipped)


def _lose(seconds: float, longer: float) -> float:
    """Return what a stretch and what is left out before it lose that takes so much longer, or took (negative)."""
    return (1 + SKIPPED) * seconds * abs(math.expm1(longer))
