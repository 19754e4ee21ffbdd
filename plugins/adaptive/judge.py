"""Do drafts pay for the load as a whole? Tokens per second over stretches with and without them, compared; pure.

What single steps cost does not say everything: with drafts no two answers end together, prompts are read one by one
that plain decoding reads at once, contexts are written between steps.  So the engine's work is cut into stretches of
about as many tokens as are answered in one turn of its requests, with the policy's drafts or without any, and each is
compared with the one of the other sort just before it: as near as can be, as the machine's pace changes.  Loads differ
by their number of requests, in powers of two.

The sort that is behind is tried again when it is paid for: a small part of all time goes into a purse, and a stretch
takes from it what it is expected to lose.  Before anything was compared, the gain is what the policy expects of its
steps.  More than a few requests begin with a stretch without drafts, which loses little whatever is true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Of all time, for stretches of the sort that is behind; one that is hardly behind counts as this much behind.
EXPLORED, LEAST_LOSS = 0.005, 0.02
# Tokens of a stretch: at least, and for each request as many as an answer has, between these.
LEAST_TOKENS, LEAST_EACH, MOST_EACH = 128, 16.0, 128.0
# Of a stretch after one of the other sort, as a share, what does not count: it writes what that one left, or uses it.
SKIPPED = 0.5
# Answers after which one weighs little in their mean length; comparisons in that of the gain.
MEMORY_ANSWERS, MEMORY_COMPARED = 64, 4
# Steps with drafts, as a share, without which a stretch is as good as one without any: nothing to forbid.
LEAST_DRAFTED = 0.1
# As far as one comparison is believed, in natural logarithms.
MOST_GAIN = 0.4
# Up to so many requests at once begin with drafts.
FEW = 4


@dataclass(slots=True)
class Stretch:
    """Tokens that were answered, and seconds, with drafts where they seemed to pay or without any."""

    drafting: bool
    tried: bool = False  # though its sort is behind
    skipped: float = 0.0  # tokens that are yet to be left out
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0  # steps with drafts


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
        return self._find(requests).stretch.drafting

    def expect(self, requests: int, gain: float) -> None:
        """Take in what the policy expects drafts to gain, which holds until something was compared."""
        load = self._find(requests)
        if not load.compared:
            load.gain = gain

    def end_answer(self, tokens: int) -> None:
        """Take in how long an answer was."""
        self._answers = min(self._answers + 1, MEMORY_ANSWERS)
        self._length += (tokens - self._length) / self._answers

    def observe(self, requests: int, tokens: int, seconds: float, *, drafted: bool) -> None:
        """Take in a step of so many requests that decoded (0: it read prompts alone), whole, and what it answered."""
        self._last = requests or self._last
        load = self._find(self._last)
        load.purse += EXPLORED * seconds
        stretch = load.stretch
        if stretch.skipped > 0:
            stretch.skipped -= tokens
            return
        stretch.tokens += tokens
        stretch.seconds += seconds
        stretch.steps += 1
        stretch.drafted += drafted
        if stretch.tokens >= max(LEAST_TOKENS, self._last * min(MOST_EACH, max(LEAST_EACH, self._length))):
            _turn(load)

    def _find(self, requests: int) -> Load:
        power = (requests - 1).bit_length()
        load = self._loads.get(power)
        if load is None:
            load = self._loads[power] = Load(Stretch(drafting=requests <= FEW))
        return load


def _turn(load: Load) -> None:
    """Compare the stretch that has ended with the one before, pay for it, and begin the next."""
    ended, before = load.stretch, load.before
    if ended.drafting and ended.drafted < LEAST_DRAFTED * ended.steps:
        load.before, load.stretch = None, Stretch(drafting=True)
        return
    if before is not None and before.drafting != ended.drafting:
        longer = math.log(ended.seconds * before.tokens / (before.seconds * ended.tokens))
        if ended.tried:
            load.purse -= _lose(ended.seconds, -max(LEAST_LOSS, longer))
        gain = max(-MOST_GAIN, min(MOST_GAIN, -longer if ended.drafting else longer))
        load.compared += 1
        load.gain += (gain - load.gain) / min(load.compared + 1, MEMORY_COMPARED)
    ahead = load.gain >= 0
    tried = ended.drafting == ahead and _lose(ended.seconds, max(LEAST_LOSS, abs(load.gain))) <= load.purse
    drafting = ahead != tried
    skipped = SKIPPED * ended.tokens if drafting != ended.drafting else 0.0
    load.before, load.stretch = ended, Stretch(drafting, tried, skipped)


def _lose(seconds: float, longer: float) -> float:
    """Return what a stretch and what is left out before it lose that takes so much longer, or took (negative)."""
    return (1 + SKIPPED) * seconds * abs(math.expm1(longer))
