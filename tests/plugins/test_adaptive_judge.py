"""The judge of the load as a whole, on made-up loads: what it forbids, how soon, at what cost, and what it forgets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from laguna_serve.plugins.adaptive.costs import Measured
from laguna_serve.plugins.adaptive.judge import FEW, Judge


def step(requests: int, tokens: int, seconds: float, *, drafted: bool) -> Measured:
    return Measured(requests, 2 * requests * drafted, seconds, tokens=tokens, whole_s=seconds)


@dataclass
class Lived:
    """Tokens and seconds of a run, and those of its steps with drafts."""

    tokens: int = 0
    seconds: float = 0.0
    drafted_s: float = 0.0

    @property
    def share(self) -> float:
        """Share of the time with drafts."""
        return self.drafted_s / self.seconds

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def live(judge: Judge, requests: int, steps: int, gain: Callable[[int], float], **changes: object) -> Iterator[Lived]:
    """Run an engine whose step of plain decoding takes 1 s, with drafts three tokens in 3 / exp(gain) s; by step.

    `expected`: what the policy believes; `slow`: a factor on all times by step; `drafts`: whether it drafts in a step.
    """
    draw, lived = random.Random(1), Lived()
    slow: Callable[[int], float] = changes.get("slow", lambda _step: 1.0)  # type: ignore[assignment]
    drafts: Callable[[int], bool] = changes.get("drafts", lambda _step: True)  # type: ignore[assignment]
    for number in range(steps):
        allowed = judge.allows(requests)
        if allowed:
            judge.expect(requests, float(changes.get("expected", 0.1)))  # type: ignore[arg-type]
        drafted = allowed and drafts(number)
        tokens = 3 * requests if drafted else requests
        seconds = (3 / math.exp(gain(number)) if drafted else 1.0) * slow(number) * math.exp(draw.gauss(-0.005, 0.1))
        judge.observe(step(requests, tokens, seconds, drafted=drafted), 0.0)
        lived.tokens += tokens
        lived.seconds += seconds
        lived.drafted_s += seconds if drafted else 0.0
        yield lived


def live_on(judge: Judge, requests: int, steps: int, gain: float, **changes: object) -> Lived:
    """Run to the end with the same gain."""
    *_, lived = live(judge, requests, steps, lambda _step: gain, **changes)
    return lived


@pytest.mark.parametrize("requests", [5, 16, 64])
@pytest.mark.parametrize("gain", [-0.7, -0.2, -0.05, 0.05, 0.2, 0.7])
def test_it_comes_within_two_percent_of_the_better_sort_though_steps_look_worth_it(requests: int, gain: float) -> None:
    judge = Judge()
    live_on(judge, requests, 3000, gain)
    lived = live_on(judge, requests, 20_000, gain)
    assert lived.rate > 0.98 * requests * max(1, math.exp(gain))
    if abs(gain) >= 0.2:
        assert lived.share < 0.06 if gain < 0 else lived.share > 0.94


def test_it_finds_out_when_drafts_begin_to_pay_and_when_they_end_to() -> None:
    judge, shares, before = Judge(), [], Lived()
    for lived in live(judge, 16, 30_000, lambda step: 0.3 if 10_000 <= step < 20_000 else -0.3):
        if lived.tokens // 50_000 > before.tokens // 50_000:
            shares.append((lived.drafted_s - before.drafted_s) / (lived.seconds - before.seconds))
            before = Lived(lived.tokens, lived.seconds, lived.drafted_s)
    assert max(shares[1:3]) < 0.1
    assert max(shares) > 0.9
    assert shares[-1] < 0.1


def test_the_machine_s_pace_changes_no_verdict() -> None:
    for gain in (-0.2, 0.2):
        judge = Judge()
        lived = live_on(judge, 16, 20_000, gain, slow=lambda step: 2.0 if step // 1000 % 2 else 1.0)
        assert lived.share < 0.1 if gain < 0 else lived.share > 0.9


def test_few_requests_are_not_judged_and_more_begin_without_drafts() -> None:
    for requests, drafting in ((1, True), (FEW, True), (FEW + 1, False), (64, False)):
        assert Judge().allows(requests) is drafting
    assert live_on(Judge(), FEW, 5000, -0.5).share == 1


def test_loads_are_judged_apart() -> None:
    judge = Judge()
    live_on(judge, 8, 5000, 0.3)
    live_on(judge, 64, 5000, -0.3)
    assert live_on(judge, 8, 1000, 0.3).share > 0.8
    assert live_on(judge, 50, 1000, -0.3).share < 0.2


def test_prompts_belong_to_the_load_that_they_were_read_for() -> None:
    """Drafts cost no step anything, and double what reading takes."""
    judge, drafted_s, seconds = Judge(), 0.0, 0.0
    for number in range(20_000):
        drafting = judge.allows(32)
        judge.observe(step(32, 32, 1.0, drafted=drafting), 0.0)
        reading = 0.0
        if number % 16 == 0:
            reading = 8.0 if drafting else 4.0
            judge.observe(step(0, 0, reading, drafted=False), 4.0)
        seconds += 1.0 + reading
        drafted_s += (1.0 + reading) * drafting
    assert drafted_s < 0.1 * seconds


def test_where_the_policy_hardly_drafts_there_is_nothing_to_forbid() -> None:
    judge = Judge()
    live_on(judge, 64, 100, -0.5, drafts=lambda _step: False)
    lived = live_on(judge, 64, 5000, -0.5, drafts=lambda step: step % 20 == 0)
    assert lived.share > 0.05


def test_what_a_stretch_leaves_to_the_next_is_not_held_against_it() -> None:
    """The first steps with drafts write the context of those without; on the whole drafts pay."""
    judge, drafting, since, drafted_s, seconds = Judge(), False, 0, 0.0, 0.0
    for _ in range(20_000):
        allowed = judge.allows(32)
        since = since + 1 if allowed is drafting else 0
        drafting = allowed
        taken = (2.5 + (4 if since < 2 else 0)) if drafting else 1.0
        judge.observe(step(32, 96 if drafting else 32, taken, drafted=drafting), 0.0)
        seconds += taken
        drafted_s += taken * drafting
    assert drafted_s > 0.9 * seconds


def test_prompts_that_come_unevenly_change_no_verdict() -> None:
    """Drafts gain a tenth; for every other fifty steps prompts take most of the time."""
    judge, drafted_s, seconds = Judge(), 0.0, 0.0
    for number in range(20_000):
        drafting = judge.allows(32)
        reading = 3.0 if number // 50 % 2 else 0.0
        taken = 2.7 if drafting else 1.0
        judge.observe(step(32, 96 if drafting else 32, taken + reading, drafted=drafting), reading)
        seconds += taken
        drafted_s += taken * drafting
    assert drafted_s > 0.9 * seconds
