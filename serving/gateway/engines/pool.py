"""Which engine takes a request, and how long it may wait for one: slots and a bounded queue.

A slot is held from the choice of an engine to the last byte of its answer. Requests wait by priority, then in the
order in which they came. Where no engine is up, those that are down for silence alone are tried all the same: they may
only be slow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from laguna_serve.serving.gateway.config.tables import Limits, Model, Upstream
from laguna_serve.serving.gateway.engines.engine import UNVERSIONED, Engine, choose, match
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.engines.waiting import Ticket, WaitingLine
from laguna_serve.serving.gateway.engines.weight_policy import WeightPolicy, find_latest, list_allowed
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.http1 import Waits

# Requests may be sent to another engine for this share of all, and so many more in a burst: engines that fail together
# are not to get every request several times.
RETRY_SHARE, RETRY_BURST = 0.2, 10.0
# What a version may be: it stands in headers and in streams.
VERSION = r"^[A-Za-z0-9._:+-]{1,64}$"
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pool:
    """The engines of one model. `held`: those that were paused last; a reload may have taken some of them out."""

    keeps_renamed: ClassVar[bool] = True
    model: Model
    limits: Limits
    clock: Callable[[], float] = time.monotonic
    engines: list[Engine] = field(default_factory=list)
    paused: bool = False
    held: list[Engine] = field(default_factory=list)
    versions: tuple[bytes, bytes] = UNVERSIONED
    updated: bool = False
    waits: Waits = field(init=False)
    _retries: float = RETRY_BURST
    _line: WaitingLine = field(default_factory=WaitingLine)

    def __post_init__(self) -> None:
        self._take_limits(self.limits)

    def plan(self, model: Model) -> list[Engine]:
        """Plan the engines of a configuration, changing nothing; one of the same URL keeps its state."""
        known = match(self.engines, model.upstreams, renamed=self.keeps_renamed)
        return [engine or self._make_engine(of) for engine, of in zip(known, model.upstreams, strict=True)]

    def configure(self, model: Model, limits: Limits, engines: list[Engine] | None = None) -> None:
        """Take a configuration, with the engines that `plan` made for it; those who wait look again."""
        engines = self.plan(model) if engines is None else engines
        for gone in self.engines:
            if gone not in engines and not gone.removed:
                gone.remove()
        for engine, upstream in zip(engines, model.upstreams, strict=True):
            if engine.config is not upstream:
                engine.config = upstream
                engine.origin.configure(upstream)
        self.model, self.engines = model, engines
        self._take_limits(limits)
        self._line.wake_all()

    def close(self) -> None:
        """Close the connections that are idle."""
        for engine in self.engines:
            engine.origin.close()

    def remove(self) -> None:
        """Take the model out: it is in the configuration no more. What is in flight, or waits, finishes."""
        for engine in self.engines:
            engine.remove()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._line.length

    def take(
        self,
        affinity: bytes | None,
        avoid: frozenset[Engine] = frozenset(),
        *,
        ticket: Ticket | None = None,
        policy: WeightPolicy | None = None,
    ) -> Engine | None:
        """Take a slot of an engine, where one is free and nobody was before; `release` gives it back.

        Args:
            affinity: what belongs together goes to one engine while that has room.
            avoid: engines that this request has tried.
            ticket: with which it has waited for its turn.
            policy: which weights may answer it; while they are changed, or an engine has yet to say its own, it waits.
        Raises:
            GatewayError: 503 no engine is up, or none with such weights.
        """
        now = self.clock()
        up = [engine for engine in self.engines if engine.is_up(now) and engine not in avoid]
        up = up or [engine for engine in self.engines if engine.is_last_resort() and engine not in avoid]
        if not up:
            if any((engine.returns or engine.unasked) and engine.fenced is None for engine in self.engines):
                return None
            raise errors.not_ready()
        if self.paused or self._is_behind(ticket):
            return None
        if policy is not None:
            up = list_allowed(up, policy, self.versions[0] if self.updated else None, self.engines)
        free = [engine for engine in up if engine.has_slot()]
        if not free:
            return None
        engine = choose(free, affinity)
        engine.in_flight += 1
        engine.turns += 1
        if self._line and (len(free) > 1 or engine.has_slot()):
            self.wake()  # an engine that came back has room for more than the one who was woken
        return engine

    async def acquire(
        self,
        affinity: bytes | None,
        avoid: frozenset[Engine] = frozenset(),
        deadline: float | None = None,
        priority: int = 0,
        policy: WeightPolicy | None = None,
    ) -> Engine:
        """`take`, after a wait in the queue where it must be: until `deadline`, by default that of the limits.

        A smaller `priority` goes first.

        Raises:
            GatewayError: 503 no engine is up (by the deadline, if one returns) or has such weights, 429 the queue is
                full, 408 no slot in time.
        """
        if (engine := self.take(affinity, avoid, policy=policy)) is not None:
            return engine
        # Those who cannot take every slot are counted apart, so that they fill no queue for those who can.
        limited = policy is not None or bool(avoid)
        if self._line.count(limited=limited) >= self.limits.max_queued:
            raise errors.contended()
        if deadline is None:
            deadline = self.clock() + self.limits.queue_timeout_s
        try:
            with self._line.draw(priority, limited=limited) as ticket:
                nudge = self._must_nudge(limited)
                while True:
                    await self._line.wait(ticket, deadline - self.clock(), nudge=nudge)
                    nudge = False
                    if (engine := self.take(affinity, avoid, ticket=ticket, policy=policy)) is not None:
                        return engine
                    if limited:  # the slot that woke it may be none for it, and is somebody else's then
                        self._line.wake_behind(ticket)
        except TimeoutError:
            raise self._explain_timeout(policy) from None
        except GatewayError:
            self.wake()
            raise

    def succeed(self, old: Engine, url: str) -> None:
        """Put a new engine, at a new address, in the place of one that died.

        It has the checkpoint's weights: after an update it is fenced off until the next one, which must bring it all.
        """
        upstream = old.config.model_copy(update={"url": url})
        new = self._make_engine(upstream)
        new.stats, new.turns, new.lost_s = old.stats, old.turns, old.lost_s
        new.returns, new.restarts, new.deaths = True, old.restarts + 1, old.deaths
        if self.updated:
            new.fence(f"weights: expected version {self.versions[0].decode()}, got the checkpoint's after a restart")
        self.engines = [new if engine is old else engine for engine in self.engines]
        upstreams = tuple(engine.config for engine in self.engines)
        self.model = self.model.model_copy(update={"upstreams": upstreams})
        old.remove()
        self.welcome(new)
        self._line.wake_all()

    def give_up(self, engine: Engine) -> None:
        """Note that it is not started again: nobody need wait for it."""
        engine.returns = False
        self._line.wake_all()

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
        """Let requests that come wait in the queue until `resume`; engines may be silent."""
        self.paused = True
        logger.info("model %s paused: requests wait", self.model.name)
        self.held = list(dict.fromkeys((*self.held, *self.engines)))
        for engine in self.held:
            engine.origin.silence_allowed = True

    def resume(self) -> None:
        """Go on; those who waited look again."""
        self.paused = False
        logger.info("model %s resumed", self.model.name)
        for engine in {*self.engines, *self.held}:
            engine.origin.silence_allowed = False
        self.held = []
        self._line.wake_all()

    @property
    def newest(self) -> bytes:
        """The version that all should have; where none was set, the newest that an engine has."""
        if self.updated or not self.engines:
            return self.versions[0]
        return find_latest(engine.versions[0] for engine in self.engines)

    def adopt_versions(self) -> bool:
        """Take over what all engines say of their weights, where none were set. False: they differ, or are silent."""
        if not self.updated:
            said = {engine.versions for engine in self.engines}
            if len(said) > 1 or not all(engine.versions_known for engine in self.engines):
                return False
            self.versions = next(iter(said), self.versions)
        return True

    def set_versions(self, weights: str | None, draft: str | None) -> None:
        """Every engine has these from now on; None is as before. No engine is fenced off any more."""
        self.updated = True
        self.versions = (
            self.versions[0] if weights is None else weights.encode(),
            self.versions[1] if draft is None else draft.encode(),
        )
        for engine in self.engines:
            was_fenced = engine.fenced is not None
            engine.versions = self.versions
            engine.unfence()
            if was_fenced:
                self.welcome(engine)

    def refresh(self) -> None:
        """Look what the engines have in flight, where several processes send to them."""

    def release(self, engine: Engine) -> None:
        """Give a slot back; the first in the queue is woken."""
        engine.release()
        self.wake()

    def is_ready(self, now: float) -> bool:
        """Whether there is an engine that was well, and that a request would be sent to."""
        known = [engine for engine in self.engines if engine.seen_well]
        return any(engine.healthy and engine.is_up(now) for engine in known) or (
            not any(engine.is_up(now) for engine in self.engines) and any(engine.is_last_resort() for engine in known)
        )

    def welcome(self, engine: Engine) -> None:
        """Note that an engine is up that was not: it gets its share from now on, and nothing of what it missed."""
        others = [other.turns / other.config.weight for other in self.engines if other is not engine]
        engine.turns = max(engine.turns, max(others, default=0.0) * engine.config.weight)
        self.wake()

    def note_versions_known(self, engine: Engine) -> None:
        """Note that an engine has said which weights it has; those who wait look again."""
        engine.versions_known = True
        self.wake_all()

    def wake(self) -> None:
        """Let the first in the queue look again."""
        self._line.wake()

    def wake_all(self) -> None:
        """Let everybody in the queue look again."""
        self._line.wake_all()

    def _must_nudge(self, limited: bool) -> bool:
        """Whether the first should look now that one has come: it may be for a slot that those before cannot take."""
        return self._line.limited > limited

    def _is_behind(self, ticket: Ticket | None) -> bool:
        """Whether somebody else's turn is first; one that has been woken has its own."""
        return ticket is None and self._line.length > 0

    def _take_limits(self, limits: Limits) -> None:
        self.limits = limits
        self.waits = Waits(limits.first_byte_timeout_s, limits.read_timeout_s)

    def _make_engine(self, upstream: Upstream) -> Engine:
        """Where weights have been updated, or are, one that comes is sent nothing before it has said which it has."""
        origin = Origin(upstream.url)
        origin.configure(upstream)
        doubted = self.updated or self.paused
        healthy = False if doubted else None
        return Engine(upstream, origin, healthy=healthy, refused=doubted, unasked=doubted)

    def _explain_timeout(self, policy: WeightPolicy | None) -> GatewayError:
        """Say for what somebody waited in vain."""
        now = self.clock()
        up = [engine for engine in self.engines if engine.is_up(now)]
        if not up:
            return errors.not_ready()
        if policy is not None and not (self.updated or all(engine.versions_known for engine in up)):
            return errors.weights_unknown(str(policy))
        return errors.queue_timeout()
