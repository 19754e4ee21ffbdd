"""Which engine takes a request, and how long it may wait for one: slots, a bounded queue, health and a circuit breaker.

A slot is held from the choice of an engine to the last byte of its answer. Requests wait in the order in which they
came. An engine that cannot be reached BREAK_AFTER times in a row is left alone for COOL_DOWN_S, doubled with every
failed trial up to MOST_COOL_DOWN_S; a health check that succeeds closes the breaker at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.config import Limits, Model, Upstream
from laguna_serve.serving.gateway.http1 import Origin
from laguna_serve.serving.gateway.metrics import EngineStats

BREAK_AFTER = 3
COOL_DOWN_S = 1.0
MOST_COOL_DOWN_S = 30.0
# Requests may be sent to another engine for this share of all, and so many more in a burst: engines that fail together
# are not to get every request several times.
RETRY_SHARE, RETRY_BURST = 0.2, 10.0
# What a version may be: it stands in headers and in streams.
VERSION = r"^[A-Za-z0-9._:+-]{1,64}$"
# As vLLM calls weights that were never updated.
UNVERSIONED = (b"default", b"default")


@dataclass(slots=True, eq=False)
class Engine:
    """An upstream's state.

    `healthy` is the last health check's word, None before the first. `turns` counts requests, for shares by weight; it
    is moved on for an engine that was away (`Pool.welcome`). `versions` are those of its weights and its drafter's; a
    `fenced` one has other weights than it should, and is sent nothing.
    """

    config: Upstream
    origin: Origin
    stats: EngineStats = field(default_factory=EngineStats)
    versions: tuple[bytes, bytes] = UNVERSIONED
    in_flight: int = 0
    turns: float = 0.0
    healthy: bool | None = None
    failures: int = 0
    open_until: float = 0.0
    last_error: str | None = None
    fenced: str | None = None
    last_scrape: tuple[float, dict[str, float]] | None = None

    @property
    def name(self) -> str:
        """The configured one."""
        return self.config.name

    @property
    def up(self) -> bool:
        """May it be sent something now?"""
        return self.is_up(time.monotonic())

    def is_up(self, now: float) -> bool:
        """May it be sent something? After a cool-down one failure more is enough to leave it alone again."""
        return self.healthy is not False and self.fenced is None and now >= self.open_until

    def fence(self, reason: str) -> None:
        """Its weights are not those of the others: nothing is sent to it until an update succeeds."""
        self.fenced = self.last_error = reason

    def has_slot(self) -> bool:
        """Is there room for one request more?"""
        return self.in_flight < self.config.max_in_flight

    def note_failure(self, reason: str, now: float) -> None:
        """It could not be reached. (One that breaks off is not left alone for it: the request may be to blame.)"""
        self.failures += 1
        self.last_error = reason
        if self.failures >= BREAK_AFTER:
            times = min(self.failures - BREAK_AFTER, 10)
            self.open_until = now + min(MOST_COOL_DOWN_S, COOL_DOWN_S * 2**times)

    def note_success(self) -> None:
        """It answered."""
        self.failures = 0
        self.open_until = 0.0


@dataclass(slots=True, eq=False)
class Pool:
    """The engines of one model."""

    model: Model
    limits: Limits
    clock: Callable[[], float] = time.monotonic
    engines: list[Engine] = field(default_factory=list)
    paused: bool = False
    versions: tuple[bytes, bytes] = UNVERSIONED
    updated: bool = False
    _retries: float = RETRY_BURST
    _tickets: Iterator[int] = field(default_factory=itertools.count)
    _waiting: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)
    _queued: int = 0

    def configure(self, model: Model, limits: Limits) -> None:
        """Take a configuration. An engine of the same name and URL keeps its state; those who wait look again."""
        known: dict[tuple[str, str], Engine | None] = {(e.config.name, e.config.url): e for e in self.engines}
        engines = [known.pop((u.name, u.url), None) or Engine(u, Origin(u.url)) for u in model.upstreams]
        for gone in filter(None, known.values()):
            gone.origin.close()
        for engine, upstream in zip(engines, model.upstreams, strict=True):
            engine.config = upstream
        self.model, self.limits, self.engines = model, limits, engines
        self._wake_all()

    def close(self) -> None:
        """Close the connections that are idle."""
        for engine in self.engines:
            engine.origin.close()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._queued

    def take(
        self, affinity: bytes | None, avoid: frozenset[Engine] = frozenset(), *, woken: bool = False
    ) -> Engine | None:
        """Take a slot of an engine, where one is free and nobody was before; `release` gives it back.

        Args:
            affinity: what belongs together goes to one engine while that has room.
            avoid: engines that this request has tried.
            woken: it has waited for its turn.
        Raises:
            GatewayError: 503 no engine is up.
        """
        now = self.clock()
        up = [engine for engine in self.engines if engine.is_up(now) and engine not in avoid]
        if not up:
            raise errors.not_ready()
        if self.paused or (self._queued and not woken):
            return None
        free = [engine for engine in up if engine.has_slot()]
        if not free:
            return None
        engine = self._choose(free, affinity)
        engine.in_flight += 1
        engine.turns += 1
        if self._waiting and (len(free) > 1 or engine.has_slot()):
            self.wake()  # an engine that came back has room for more than the one who was woken
        return engine

    async def acquire(self, affinity: bytes | None, avoid: frozenset[Engine] = frozenset()) -> Engine:
        """`take`, after a wait in the queue where it must be.

        Raises:
            GatewayError: 503 no engine is up, 429 the queue is full, 408 no slot in time.
        """
        if (engine := self.take(affinity, avoid)) is not None:
            return engine
        if self._queued >= self.limits.max_queued:
            raise errors.contended()
        ticket, deadline = next(self._tickets), self.clock() + self.limits.queue_timeout_s
        while True:
            await self._wait(ticket, deadline - self.clock())
            if (engine := self.take(affinity, avoid, woken=True)) is not None:
                return engine

    def may_retry(self) -> bool:
        """Take from the budget of second tries."""
        if self._retries < 1:
            return False
        self._retries -= 1
        return True

    def note_request(self) -> None:
        """Every request adds to that budget."""
        self._retries = min(RETRY_BURST, self._retries + RETRY_SHARE)

    def pause(self) -> None:
        """Requests that come wait in the queue until `resume`; engines may be silent."""
        self.paused = True
        for engine in self.engines:
            engine.origin.silence_allowed = True

    def resume(self) -> None:
        """Go on; those who waited look again."""
        self.paused = False
        for engine in self.engines:
            engine.origin.silence_allowed = False
        self._wake_all()

    def set_versions(self, weights: str | None, draft: str | None) -> None:
        """Every engine has these from now on; None is as before. No engine is fenced off any more."""
        self.updated = True
        self.versions = (
            self.versions[0] if weights is None else weights.encode(),
            self.versions[1] if draft is None else draft.encode(),
        )
        for engine in self.engines:
            was_fenced = engine.fenced is not None
            engine.versions, engine.fenced = self.versions, None
            if was_fenced:
                self.welcome(engine)

    def release(self, engine: Engine) -> None:
        """Give a slot back; the first in the queue is woken."""
        engine.in_flight -= 1
        self.wake()

    def welcome(self, engine: Engine) -> None:
        """An engine is up that was not: it gets its share from now on, and nothing of what it missed."""
        others = [other.turns / other.config.weight for other in self.engines if other is not engine]
        engine.turns = max(engine.turns, max(others, default=0.0) * engine.config.weight)
        self.wake()

    def wake(self) -> None:
        """Let the first in the queue look again."""
        while self._waiting:
            _, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                return

    def _wake_all(self) -> None:
        for _ in range(len(self._waiting)):
            self.wake()

    async def _wait(self, ticket: int, timeout_s: float) -> None:
        """Until woken. Who looked in vain keeps the place that the ticket gives."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (ticket, future))
        self._queued += 1
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.done() and not future.cancelled():
                self.wake()  # woken and ended at once: the turn is the next one's
            if isinstance(error, TimeoutError):
                raise errors.queue_timeout() from None
            raise
        finally:
            self._queued -= 1
            future.cancel()
            if len(self._waiting) > 2 * self._queued + 64:  # mostly of those who have left
                self._waiting = [entry for entry in self._waiting if not entry[1].done()]
                heapq.heapify(self._waiting)

    def _choose(self, free: list[Engine], affinity: bytes | None) -> Engine:
        """By weight either way: of what belongs together the same one, else the one with the least to do for its
        weight, and among idle ones the one that has had the least. Engines for which speculation pays at their load
        come first, then plain ones."""
        if len(free) == 1:
            return free[0]
        paying = [e for e in free if e.config.gamma_schedule and e.config.pays(e.in_flight + 1)]
        free = paying or [engine for engine in free if not engine.config.gamma_schedule] or free
        if affinity is not None:
            return max(free, key=lambda engine: _score(affinity, engine.config))
        return min(
            free, key=lambda e: ((e.in_flight + 1) / e.config.weight if e.in_flight else 0, e.turns / e.config.weight)
        )


def _score(affinity: bytes, upstream: Upstream) -> float:
    """Weighted rendezvous hashing: when an engine comes or goes, only what was its own moves; each gets a share of the
    keys as large as its weight."""
    digest = hashlib.blake2b(affinity + b"\0" + upstream.name.encode(), digest_size=8).digest()
    return -upstream.weight / math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1))
