"""How many tokens a running engine's steps bring: the acceptance length, read from its metrics.

Acceptance length τ = 1 + accepted ÷ drafts, from the counters that vLLM keeps from its start on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.exposition import read_samples
from laguna_serve.serving.kit.progress import say
from laguna_serve.serving.machine.local_http import OK, ask_engine

TIMEOUT_S = 2.0
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
# With a worthless drafter a step of γ = 7 costs 1.67 plain steps (toy pair, two cores): a shorter length loses.
BREAK_EVEN = 1.7
MIN_DRAFTS = 200
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


class AcceptanceReport(msgspec.Struct, frozen=True):
    """For a result: tokens per step, None before the first draft, and the steps with a draft."""

    length: float | None
    drafts: int


def read_acceptance(base_url: str) -> Acceptance | None:
    """Read what the engine's /metrics say; None when it does not answer in time or does not speculate."""
    try:
        status, text = ask_engine(base_url, "/metrics", timeout_s=TIMEOUT_S)
        samples = read_samples(text.decode("utf-8", "replace")) if status == OK else []
    except (OSError, EndpointError):
        return None
    sums: dict[str, float] = {}
    for sample in samples:
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    if DRAFTS not in sums or ACCEPTED not in sums:
        return None
    return Acceptance(int(sums[DRAFTS]), int(sums[ACCEPTED]))


def format_acceptance(acceptance: Acceptance, gamma: int, *, adaptive: bool = False) -> str:
    """One line for people, with advice where speculation probably costs more than it brings.

    With an adaptive γ nothing is advised: it is left out where it does.
    """
    length = acceptance.length or 1.0
    line = f"acceptance: {length:.2f} tokens per step (at most {gamma + 1}), over {acceptance.drafts:,} drafts"
    if length < BREAK_EVEN and not adaptive:
        line += "; a step with a draft costs more than a plain one: compare with bench/ab.py, or serve without --draft"
    return line


class AcceptanceWatch:
    """Reads a speculating engine's acceptance now and then, and prints it once it rests on enough drafts."""

    def __init__(self, base_url: str, gamma: int | None, *, adaptive: bool = False) -> None:
        self._base_url, self._gamma, self._adaptive = base_url, gamma, adaptive
        self._last = time.monotonic()
        self._shown = False
        self._seen: Acceptance | None = None

    def look(self) -> None:
        """Ask the engine seldom, though called often, and no more once the line is out."""
        if self._gamma is None or self._shown or time.monotonic() - self._last < LOOK_S:
            return
        self.read()
        if self._seen is not None and self._seen.drafts >= MIN_DRAFTS:
            say(format_acceptance(self._seen, self._gamma, adaptive=self._adaptive))
            self._shown = True

    def read(self) -> None:
        """Asks now; an engine that does not answer leaves what was known."""
        if self._gamma is not None:
            self._seen = read_acceptance(self._base_url) or self._seen
            self._last = time.monotonic()

    def describe(self) -> AcceptanceReport | None:
        """Since the engine started; None without speculation."""
        if self._seen is None:
            return None
        length = self._seen.length
        return AcceptanceReport(None if length is None else round(length, 3), self._seen.drafts)
