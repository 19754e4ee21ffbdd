"""How many tokens a running engine's steps bring: the acceptance length, read from its metrics.

Acceptance length τ = 1 + accepted ÷ drafts, from the counters that vLLM keeps from its start on.
"""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

TIMEOUT_S = 2.0
COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
# With a worthless drafter a step of γ = 7 costs 1.67 plain steps (toy pair, two cores): a shorter length loses.
BREAK_EVEN = 1.7
ENOUGH_DRAFTS = 200
# Between two looks at a running engine.
LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Steps with a draft since the engine started, and the tokens accepted in them."""

    drafts: int
    accepted: int

    @property
    def length(self) -> float | None:
        """Tokens per step, None before the first draft."""
        return 1 + self.accepted / self.drafts if self.drafts else None


def read_acceptance(base_url: str) -> Acceptance | None:
    """What the engine's /metrics say; None when it does not answer in time or does not speculate."""
    try:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError):
        return None
    sums: dict[str, float] = {}
    for name, value in COUNTER.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    if sums.keys() != {"drafts", "accepted_tokens"}:
        return None
    return Acceptance(int(sums["drafts"]), int(sums["accepted_tokens"]))


def format_acceptance(acceptance: Acceptance, gamma: int) -> str:
    """One line for people, with advice where speculation probably costs more than it brings."""
    length = acceptance.length or 1.0
    line = f"acceptance: {length:.2f} tokens per step (at most {gamma + 1}), over {acceptance.drafts:,} drafts"
    if length < BREAK_EVEN:
        line += "; a step with a draft costs more than a plain one: compare with bench/ab.py, or serve without --draft"
    return line


class AcceptanceWatch:
    """Reads a speculating engine's acceptance now and then, and prints it once it rests on enough drafts."""

    def __init__(self, base_url: str, gamma: int | None) -> None:
        self._base_url, self._gamma = base_url, gamma
        self._last = time.monotonic()
        self._shown = False
        self._seen: Acceptance | None = None

    def look(self) -> None:
        """Called often; asks the engine seldom, and no more once the line is out."""
        if self._gamma is None or self._shown or time.monotonic() - self._last < LOOK_S:
            return
        self.read()
        if self._seen is not None and self._seen.drafts >= ENOUGH_DRAFTS:
            print(format_acceptance(self._seen, self._gamma), file=sys.stderr, flush=True)
            self._shown = True

    def read(self) -> None:
        """Asks now; an engine that does not answer leaves what was known."""
        if self._gamma is not None:
            self._seen = read_acceptance(self._base_url) or self._seen
            self._last = time.monotonic()

    def describe(self) -> dict[str, float | int | None] | None:
        """For the JSON line: length and drafts since the engine started; None without speculation."""
        if self._seen is None:
            return None
        length = self._seen.length
        return {"length": None if length is None else round(length, 3), "drafts": self._seen.drafts}
