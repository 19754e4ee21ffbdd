"""What a key may: requests and tokens of a minute, of a day, at once, and for which models; against a literal model."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from laguna_serve.serving.gateway.access.asked import read_asked
from laguna_serve.serving.gateway.access.demand import NOTHING, Demand, estimate
from laguna_serve.serving.gateway.access.holder import Claim, Holder
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.wire.errors import GatewayError

DAY_S = 86_400
# A Monday's noon and a quarter.
START_S = 20_000 * DAY_S + DAY_S / 2 + 0.25


class Clock:
    """The time of day and a monotonic clock, moved by hand."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


def make_holder(clock: Clock, **limits: int) -> Holder:
    keyring = Keyring(Ledger(wall=clock), clock, clock)
    keyring.configure([make_key(**limits)])
    return keyring.holders[0]


def make_key(name: str = "k", **limits: object) -> Key:
    return Key.model_validate({"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits})


def begin(holder: Holder, demand: Demand) -> Claim:
    claim = holder.enter()
    try:
        holder.reserve(claim, "m", demand)
    except GatewayError:
        holder.leave(claim, None)
        raise
    return claim


def refuse(holder: Holder, demand: Demand) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        begin(holder, demand)
    return caught.value


def read_limits(holder: Holder) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in holder.render_limits()}


def test_tokens_of_a_minute_are_reserved_then_settled() -> None:
    clock = Clock()
    holder = make_holder(clock, tokens_per_minute=600)
    claim = begin(holder, Demand(100, 300))
    assert read_limits(holder) == {"limit-tokens": "600", "remaining-tokens": "200", "reset-tokens": "40s"}
    error = refuse(holder, Demand(0, 250))
    assert (error.status, error.reason, error.code, error.retry_after_s) == (
        *(429, "key_tokens", "rate_limit_exceeded"),
        5,
    )
    holder.leave(claim, Demand(100, 50))
    assert read_limits(holder)["remaining-tokens"] == "450"
    begin(holder, Demand(0, 450))
    clock.now_s += 5
    begin(holder, Demand(0, 50))
    assert refuse(holder, Demand(0, 1)).retry_after_s == 1


def test_answer_that_cost_more_than_there_was_is_paid_back_first() -> None:
    clock = Clock()
    holder = make_holder(clock, tokens_per_minute=60)
    holder.leave(begin(holder, Demand(10, 0)), Demand(10, 110))
    assert read_limits(holder)["remaining-tokens"] == "0"
    assert refuse(holder, Demand(0, 1)).retry_after_s == 61
    clock.now_s += 60
    assert refuse(holder, Demand(0, 1)).retry_after_s == 1
    clock.now_s += 1
    begin(holder, Demand(0, 1))


def test_request_for_more_than_a_minute_has_waits_for_a_full_one() -> None:
    clock = Clock()
    holder = make_holder(clock, tokens_per_minute=60, tokens_per_day=1000)
    claim = begin(holder, Demand(0, 500))
    holder.leave(claim, Demand(0, 30))
    assert refuse(holder, Demand(0, 500)).retry_after_s == 30
    clock.now_s += 30
    begin(holder, Demand(0, 500))


def test_budget_begins_anew_at_midnight_and_what_is_in_flight_counts_for_the_day_it_ends() -> None:
    clock = Clock()
    holder = make_holder(clock, tokens_per_day=1000)
    holder.leave(begin(holder, Demand(200, 300)), Demand(200, 300))
    late = begin(holder, Demand(100, 400))
    error = refuse(holder, Demand(0, 1))
    assert (error.reason, error.code, error.retry_after_s) == ("key_budget", "insufficient_quota", DAY_S // 2)
    assert read_limits(holder) == {"limit-tokens": "1000", "remaining-tokens": "0", "reset-tokens": f"{DAY_S // 2}s"}
    clock.now_s += DAY_S // 2
    assert (holder.used_today, holder.reserved) == (0, 500)
    assert read_limits(holder)["remaining-tokens"] == "500"
    begin(holder, Demand(0, 500))
    holder.leave(late, Demand(100, 100))
    assert holder.used_today == 200
    assert {model: tally.output_tokens for model, tally in holder.find_today().items()} == {"m": 100}
    assert holder.since_start["m"].output_tokens == 400


def test_what_no_engine_had_costs_nothing() -> None:
    holder = make_holder(Clock(), tokens_per_minute=100, tokens_per_day=100)
    holder.leave(begin(holder, Demand(50, 50)), None)
    assert (holder.in_flight, holder.used_today, holder.reserved) == (0, 0, 0)
    assert holder.since_start == {}
    begin(holder, Demand(50, 50))


def test_reload_changes_limits_and_keeps_what_is_used() -> None:
    clock = Clock()
    keyring = Keyring(Ledger(wall=clock), clock, clock)
    keyring.configure([make_key(tokens_per_minute=100, tokens_per_day=500)])
    (holder,) = keyring.holders
    claim = begin(holder, Demand(60, 0))
    keyring.configure([make_key(tokens_per_minute=100, tokens_per_day=300, requests_per_minute=5)])
    assert keyring.holders == [holder]
    assert refuse(holder, Demand(50, 0)).reason == "key_tokens"
    holder.leave(claim, Demand(60, 0))
    keyring.configure([])
    keyring.configure([make_key(tokens_per_day=300)])
    assert keyring.holders[0].used_today == 60, "a key that comes back under its name has spent what it had spent"


def test_what_is_in_flight_counts_for_a_key_that_was_taken_out_and_comes_back() -> None:
    clock = Clock()
    keyring = Keyring(Ledger(wall=clock), clock, clock)
    limits = {"tokens_per_day": 100, "requests_per_minute": 1, "max_in_flight": 2}
    keyring.configure([make_key(**limits)])
    claim = begin(keyring.holders[0], Demand(50, 40))
    first = keyring.holders[0]
    for _ in range(2):
        keyring.configure([make_key("other")])
        with pytest.raises(GatewayError):
            keyring.find({b"x-api-key": b"k"})
    keyring.configure([make_key(**limits)])
    (again,) = keyring.holders
    assert (again.in_flight, refuse(again, Demand(1)).reason) == (1, "key_rate")
    clock.now_s += 60
    assert refuse(again, Demand(50)).reason == "key_budget"
    first.leave(claim, Demand(50, 40))
    assert (again.in_flight, again.used_today) == (0, 90)


def test_keys_that_are_gone_are_forgotten_once_nothing_of_them_counts() -> None:
    clock = Clock()
    keyring = Keyring(Ledger(wall=clock), clock, clock)
    for number in range(100):
        keyring.configure([make_key(f"k{number}")])
        clock.now_s += 10
    assert len(keyring._gone) <= 7
    claim = begin(keyring.holders[0], Demand(1))
    busy = keyring.holders[0]
    keyring.configure([])
    clock.now_s += 3600
    keyring.configure([])
    assert list(keyring._gone) == ["k99"]
    busy.leave(claim, None)
    keyring.configure([])
    assert not keyring._gone


@pytest.mark.parametrize("named", [{b"x-api-key": b"k \t"}, {b"authorization": b"Bearer  k "}])
def test_blanks_around_a_key_are_none_of_it(named: dict[bytes, bytes]) -> None:
    keyring = Keyring(Ledger())
    keyring.configure([make_key()])
    assert keyring.find(named) is keyring.holders[0]
    with pytest.raises(GatewayError, match="No API key"):
        keyring.find(dict.fromkeys(named, b" "))


def test_keys_that_are_all_revoked_open_nothing() -> None:
    keyring = Keyring(Ledger())
    keyring.configure([], closed=True)
    with pytest.raises(GatewayError) as caught:
        keyring.find({})
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", b'{"model": "m", "max_tokens": 100}', Demand(9, 100)),
        ("/v1/completions", b'{"model": "m"}', Demand(4, 512)),
        ("/v1/chat/completions", b'{"max_completion_tokens": 7, "max_tokens": 100, "n": 3}', Demand(14, 21)),
        ("/v1/responses", b'{"max_output_tokens": 7, "n": "x"}', Demand(9, 7)),
        ("/v1/completions", b'{"max_tokens": -5, "n": -1, "model": "m"}', Demand(11, 512)),
        ("/v1/completions", b'{"max_tokens": 1e3, "model": "m"}', Demand(9, 512)),
        ("/v1/completions", b'{"max_tokens": %d}' % 10**30, Demand(12, 1 << 31)),
        ("/v1/embeddings", b'{"model": "m", "input": "x"}', Demand(7)),
        ("/tokenize", b'{"model": "m", "prompt": "x"}', NOTHING),
        ("/v1/models", b"", NOTHING),
    ],
)
def test_estimate(path: str, body: bytes, expected: Demand) -> None:
    assert estimate(path, read_asked(body, b"application/json"), len(body), 512) == expected


@dataclass
class Literal:
    """The limits in the words of their documentation, on exact numbers; all that happened is kept."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    max_in_flight: int | None
    taken: dict[str, list[tuple[Fraction, Fraction]]] = field(default_factory=lambda: {"requests": [], "tokens": []})
    spent: list[tuple[int, int]] = field(default_factory=list)
    open: list[int] = field(default_factory=list)

    def find_left(self, what: str, per_minute: int, now: Fraction) -> Fraction:
        """It fills through the minute up to its limit, and what was taken is missing."""
        left, since = Fraction(per_minute), Fraction(START_S)
        for at, amount in [*self.taken[what], (now, Fraction(0))]:
            left = min(Fraction(per_minute), left + (at - since) * per_minute / 60) - amount
            since = at
        return left

    def find_refusal(self, now: Fraction, cost: int) -> str | None:
        if self.max_in_flight is not None and len(self.open) >= self.max_in_flight:
            return "key_in_flight"
        if self.requests_per_minute is not None:
            if self.find_left("requests", self.requests_per_minute, now) < 1:
                return "key_rate"
            self.taken["requests"].append((now, Fraction(1)))
        per_minute = self.tokens_per_minute
        if per_minute is not None and self.find_left("tokens", per_minute, now) < min(cost, per_minute):
            return "key_tokens"
        if self.tokens_per_day is not None:
            used = sum(amount for day, amount in self.spent if day == now // DAY_S)
            if used + sum(self.open) + min(cost, self.tokens_per_day) > self.tokens_per_day:
                return "key_budget"
        self.open.append(cost)
        self.taken["tokens"].append((now, Fraction(cost)))
        return None

    def end(self, now: Fraction, cost: int, used: int | None) -> None:
        self.open.remove(cost)
        self.taken["tokens"].append((now, Fraction((used or 0) - cost)))
        if used is not None:
            self.spent.append((int(now // DAY_S), used))


def choose(luck: random.Random, *values: int) -> int | None:
    return luck.choice((None, *values))


def play(seed: int) -> set[str]:
    """One sequence of requests against both; the reasons of refusals."""
    luck, clock = random.Random(seed), Clock()
    limits = {
        "requests_per_minute": choose(luck, 1, 4, 60),
        "tokens_per_minute": choose(luck, 16, 256, 1024),
        "tokens_per_day": choose(luck, 64, 512, 4096),
        "max_in_flight": choose(luck, 1, 3),
    }
    literal, holder = Literal(**limits), make_holder(clock, **{k: v for k, v in limits.items() if v is not None})
    open_claims: list[tuple[Claim, int]] = []
    reasons = set[str]()
    for _ in range(luck.randint(5, 25)):
        clock.now_s += luck.choice((0.0, 0.0, 0.25, 1.0, 7.5, 60.0, 3600.0, 12 * 3600.0))
        now = Fraction(clock.now_s)
        if open_claims and luck.random() < 0.45:
            claim, cost = open_claims.pop(luck.randrange(len(open_claims)))
            used = luck.choice((None, Demand(0, cost), Demand(cost // 4, cost // 4), Demand(cost, cost)))
            holder.leave(claim, used)
            literal.end(now, cost, None if used is None else used.total)
        else:
            cost = luck.choice((0, 1, 4, 16, 60, 300))
            expected = literal.find_refusal(now, cost)
            if expected is None:
                open_claims.append((begin(holder, Demand(cost, 0)), cost))
            else:
                error = refuse(holder, Demand(cost, 0))
                assert (error.status, error.reason) == (429, expected), (seed, limits)
                assert (error.retry_after_s or 0) >= 1
                reasons.add(expected)
        used_today = sum(amount for day, amount in literal.spent if day == int(now // DAY_S))
        assert (holder.used_today, holder.reserved, holder.in_flight) == (
            used_today,
            sum(literal.open),
            len(literal.open),
        )
        check_told(literal, holder, now)
    for claim, _ in open_claims:
        holder.leave(claim, None)
    assert (holder.reserved, holder.in_flight) == (0, 0)
    return reasons


def check_told(literal: Literal, holder: Holder, now: Fraction) -> None:
    """What clients are told is left of requests is what is left."""
    if literal.requests_per_minute is not None:
        left = literal.find_left("requests", literal.requests_per_minute, now)
        assert abs(int(read_limits(holder)["remaining-requests"]) - max(0, int(left))) <= (left.denominator > 1)


@pytest.mark.slow
def test_random_sequences_against_the_literal_model() -> None:
    reasons = set[str]().union(*(play(seed) for seed in range(1000)))
    assert reasons == {"key_in_flight", "key_rate", "key_tokens", "key_budget"}


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "tokens_per_day"])
def test_who_comes_back_when_told_is_let_in(limit: str) -> None:
    clock = Clock()
    holder = make_holder(clock, **{limit: 37})
    for _ in range(60):
        try:
            claim = begin(holder, Demand(5, 18))
        except GatewayError as error:
            clock.now_s += error.retry_after_s or 0
            claim = begin(holder, Demand(5, 18))
        holder.leave(claim, Demand(7, 20))
    assert holder.refused > 5
