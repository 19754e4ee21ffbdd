"""A key, what is left of its limits, and what was used under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laguna_serve.serving.gateway.access.demand import NOTHING, Demand
from laguna_serve.serving.gateway.access.ledger import Ledger, Tally
from laguna_serve.serving.gateway.access.limits import DAY_S, ROUNDING, Bucket, Budget, find_midnight_s
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Headers

Clock = Callable[[], float]
REQUESTS, TOKENS = (
    tuple(b"x-ratelimit-%b-%b" % (part, what) for part in (b"limit", b"remaining", b"reset"))
    for what in (b"requests", b"tokens")
)


@dataclass(slots=True, eq=False)
class Claim:
    """What a request holds of its key: a place in flight, and tokens until it is known how many they are."""

    model: str = ""
    demand: Demand = NOTHING
    reserved: bool = False


class Holder:
    """A key and its load. `refused` counts the requests over its limits; `since_start` has what was used, by model."""

    def __init__(self, key: Key, ledger: Ledger, clock: Clock, wall: Clock) -> None:
        self._ledger, self._clock, self._wall = ledger, clock, wall
        self.in_flight = self.refused = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.since_start: dict[str, Tally] = {}
        self._tallies: dict[str, tuple[Tally, Tally]] = {}
        day = int(wall() // DAY_S)
        self._budget = Budget(day, ledger.sum_tokens(day, key.name))
        self.configure(key)

    @property
    def name(self) -> str:
        return self.key.name

    def configure(self, key: Key) -> None:
        """Take the key's limits; what has been used of one that stays is still used."""
        now = self._clock()
        self.key, self.digest = key, bytes.fromhex(key.sha256)
        self._requests = _keep(self._requests, key.requests_per_minute, now)
        self._tokens = _keep(self._tokens, key.tokens_per_minute, now)
        self.limited = bool(key.requests_per_minute or key.tokens_per_minute or key.tokens_per_day)

    def enter(self) -> Claim:
        """Take a place in flight, and one of this minute's requests; `leave` gives the first one back.

        Raises:
            GatewayError: 429 the key has as much in flight, or has asked as often, as it may.
        """
        key, requests = self.key, self._requests
        if key.max_in_flight is not None and self.in_flight >= key.max_in_flight:
            raise self._refuse(errors.key_in_flight(key.max_in_flight))
        if requests is not None:
            requests.refill(self._clock())
            if not requests.has(1):
                raise self._refuse(errors.too_often(requests.find_wait_s(1)))
            requests.take(1)
        self.in_flight += 1
        return Claim()

    def may_ask(self, model: str, name: str | None) -> bool:
        """Whether the key is for a model, by the configuration's name for it or by the one that a request has."""
        models = self.key.models
        return not models or model in models or name in models

    def reserve(self, claim: Claim, model: str, demand: Demand) -> None:
        """Take the tokens that a request for a model may cost, until it ends.

        Raises:
            GatewayError: 429 this minute's, or this day's, do not suffice.
        """
        claim.model = model
        if claim.reserved:  # it was for another model before
            return
        key, tokens, budget, total = self.key, self._tokens, self._budget, demand.total
        if tokens is not None:
            tokens.refill(self._clock())
            if not tokens.has(total):
                raise self._refuse(errors.too_many_tokens(tokens.find_wait_s(total)), model)
        if key.tokens_per_day is not None:
            now = self._turn()
            if not budget.has(total, key.tokens_per_day):
                raise self._refuse(errors.budget_used(find_midnight_s(now)), model)
        claim.demand, claim.reserved = demand, True
        if tokens is not None:
            tokens.take(total)
        budget.reserved += total

    def leave(self, claim: Claim, used: Demand | None) -> None:
        """Give back the place, and settle the tokens: `used` instead of what was reserved. None: no engine had it."""
        self.in_flight -= 1
        reserved = claim.demand.total
        self._budget.reserved -= reserved
        spent = 0 if used is None else used.total
        if self._tokens is not None and spent != reserved:
            self._tokens.refill(self._clock())
            self._tokens.take(spent - reserved)
        claim.demand = NOTHING
        if used is not None:
            self._turn()
            self._budget.used += spent
            for tally in self._find_tallies(claim.model):
                tally.requests += 1
                tally.prompt_tokens += used.prompt
                tally.output_tokens += used.output

    def refresh(self) -> None:
        """Look what has become of the limits elsewhere, where they count for several processes."""

    def find_today(self) -> Mapping[str, Tally]:
        """Find what was used today, by model; "" where none was known."""
        self._turn()
        return self._ledger.find(self._budget.day, self.name)

    @property
    def reserved(self) -> int:
        """Tokens that requests in flight may come to cost."""
        return self._budget.reserved

    @property
    def used_today(self) -> int:
        """Tokens that count for this day."""
        self._turn()
        return self._budget.used

    @property
    def budget_left(self) -> int | None:
        """Tokens that are left of this day's, without what is in flight; None without such a limit."""
        limit = self.key.tokens_per_day
        return None if limit is None else max(0, limit - self.used_today)

    def render_limits(self) -> Headers:
        """Render the headers that tell what is left, in OpenAI's words; of tokens by the limit that is nearest."""
        found: list[tuple[bytes, bytes]] = []
        if (requests := self._requests) is not None:
            requests.refill(self._clock())
            _render(found, REQUESTS, requests.per_minute, requests.left, requests.full_in_s)
        tokens, limit = self._tokens, self.key.tokens_per_day
        if tokens is not None:
            tokens.refill(self._clock())
        if limit is not None:
            wall = self._turn()
            left = limit - self._budget.used - self._budget.reserved
            if tokens is None or left < tokens.left:
                _render(found, TOKENS, limit, left, find_midnight_s(wall))
                return found
        if tokens is not None:
            _render(found, TOKENS, tokens.per_minute, tokens.left, tokens.full_in_s)
        return found

    def _turn(self) -> float:
        """Begin a new day, where this is one; the time of day, in seconds of the epoch."""
        now = self._wall()
        if (day := int(now // DAY_S)) != self._budget.day:
            self._budget.day, self._budget.used = day, self._ledger.sum_tokens(day, self.name)
            self._tallies.clear()
        return now

    def _refuse(self, error: GatewayError, model: str = "") -> GatewayError:
        """So that it is seen who is over a limit."""
        self.refused += 1
        self._turn()
        for tally in self._find_tallies(model):
            tally.refused += 1
        return error

    def _find_tallies(self, model: str) -> tuple[Tally, Tally]:
        """Find what counts for a model: since the start, and today."""
        if (found := self._tallies.get(model)) is None:
            today = self._ledger.find_row(self._budget.day, self.name, model)
            found = self._tallies[model] = (self.since_start.setdefault(model, Tally()), today)
        return found


def _keep(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    """Keep the bucket of a limit that has not changed."""
    if per_minute is None:
        return None
    return bucket if bucket is not None and bucket.per_minute == per_minute else Bucket(per_minute, now)


def _render(found: list[tuple[bytes, bytes]], names: Sequence[bytes], limit: int, left: float, reset_s: float) -> None:
    reset = b"%dms" % (reset_s * 1e3) if reset_s < 1 else b"%ds" % math.ceil(reset_s)
    shown = int(left + ROUNDING) if left > 0 else 0
    found += ((names[0], b"%d" % limit), (names[1], b"%d" % shown), (names[2], reset))
