"""How many tokens a running engine's steps bring: the acceptance length, read from its metrics.

Acceptance length τ = 1 + accepted ÷ drafts, from the counters that vLLM keeps from its start on.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import dataclass

TIMEOUT_S = 2.0
COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
# With a worthless drafter a step of γ = 7 costs 1.67 plain steps (toy pair, two cores): a shorter length loses.
BREAK_EVEN = 1.7
ENOUGH_DRAFTS = 200


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
