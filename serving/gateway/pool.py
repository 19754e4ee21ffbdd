"""Which engine takes a request, and how long it may wait for one: slots, a bounded queue, health and a circuit breaker.

A slot is held from the choice of an engine to the last byte of its answer. Requests wait in the order in which they
came. An engine that cannot be reached BREAK_AFTER times in a row is left alone for COOL_DOWN_S, doubled with every
failed trial up to MOST_COOL_DOWN_S; a health check that succeeds closes the breaker at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.config import Limits, Model, Upstream

BREAK_AFTER = 3
COOL_DOWN_S = 1.0
MOST_COOL_DOWN_S = 30.0


@dataclass(slots=True, eq=False)
class Engine:
    """An upstream's state.

    `healthy` is the last health check's word, None before the first. `turns` counts requests, for shares by weight; it
    is moved on for an engine that was away (`Pool.welcome`).
    """

    config: Upstream
    in_flight: int = 0
    turns: float = 0.0
    healthy: bool | None = None
    failures: int = 0
    open_until: float = 0.0
    last_error: str | None = None

    def is_up(self, now: float) -> bool:
        """May it be sent something? After a cool-down one failure more is enough to leave it alone again."""
        return self.healthy is not False and now >= self.open_until

    def has_slot(self) -> bool:
        """Is there room for one request more?"""
        return self.in_flight < self.config.max_in_flight

    def note_failure(self, reason: str, now: float) -> None:
        """It could not be reached, or broke off."""
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
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    def configure(self, model: Model, limits: Limits) -> None:
        """Take a configuration. An engine of the same name and URL keeps its state; those who wait look again."""
        known = {(engine.config.name, engine.config.url): engine for engine in self.engines}
        engines = [known.get((upstream.name, upstream.url)) or Engine(upstream) for upstream in model.upstreams]
        for engine, upstream in zip(engines, model.upstreams, strict=True):
            engine.config = upstream
        self.model, self.limits, self.engines = model, limits, engines
        for _ in range(self.queued):
            self.wake()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    async def acquire(self, affinity: bytes | None, avoid: frozenset[Engine] = frozenset()) -> Engine:
        """Take a slot of an engine; `release` gives it back.

        Args:
            affinity: what belongs together goes to one engine while that has room.
            avoid: engines that this request has tried.
        Raises:
            GatewayError: 503 no engine is up, 429 the queue is full, 408 no slot in time.
        """
        deadline: float | None = None
        while True:
            up = [engine for engine in self.engines if engine.is_up(self.clock()) and engine not in avoid]
            if not up:
                raise errors.not_ready()
            free = [engine for engine in up if engine.has_slot()]
            # Nobody overtakes those who wait, but for one who was just woken.
            if free and (deadline is not None or not self._waiting):
                engine = self._choose(free, affinity)
                engine.in_flight += 1
                engine.turns += 1
                if len(free) > 1 or engine.has_slot():
                    self.wake()  # an engine that came back has room for more than the one who was woken
                return engine
            if deadline is None:
                if len(self._waiting) >= self.limits.max_queued:
                    raise errors.contended()
                deadline = self.clock() + self.limits.queue_timeout_s
            await self._wait(deadline - self.clock())

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
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return

    async def _wait(self, timeout_s: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise errors.queue_timeout() from None
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.wake()  # woken and cancelled at once: the turn is the next one's
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def _choose(self, free: list[Engine], affinity: bytes | None) -> Engine:
        """By weight either way: of what belongs together the same one, else the one with the least to do for its
        weight, and among idle ones the one that has had the least."""
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
