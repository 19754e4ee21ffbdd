"""An engine as the gateway sees it: what it has in flight, and whether it may be sent more.

Three things keep requests from an engine: its health checks fail (health.py), it cannot be connected to
BREAK_AFTER times in a row (a circuit breaker: it is left alone for COOL_DOWN_S, doubled with every failed trial up to
MAX_COOL_DOWN_S, until a health check succeeds), or it is fenced off for its weights. One line in the log for every
change. An engine that is merely silent, as one is that has too much to do, stays the model's last resort.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laguna_serve.serving.gateway.config.tables import Upstream
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.telemetry.metrics import EngineStats

BREAK_AFTER = 3
COOL_DOWN_S = 1.0
MAX_COOL_DOWN_S = 30.0
# As vLLM calls weights that were never updated.
UNVERSIONED = (b"default", b"default")
# Of an engine that holds requests back, or may, while no update is under way; a health check finds when that is over.
LEFT_PAUSED = "paused: an update was broken off; update its weights, or let it go on by POST /resume to it"
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Engine:
    """An upstream's state.

    `healthy` is the health checks' verdict, None before the first, after `misses` in a row, of which `refusals` were
    more than silence; `refused`: it is down for more than silence. `turns` counts requests, for shares by weight; it is
    moved on for an engine that was away (`Pool.welcome`). `versions` are those of its weights and its drafter's; a
    `fenced` one has other weights than it should, and is sent nothing. `lost_s`: since when the log has it as lost.
    One that `returns` is started again when it dies, by whoever started it: requests wait for it. While it is `away`
    for that, it is sent nothing, whatever answers at its address. `restarts` and `deaths` (so far) are for people. One
    that came while weights were changed, or after, is `unasked` until its first health check: requests wait for that.
    With `versions_known` it has answered which versions it has; before that they may be others than `versions`.
    """

    config: Upstream
    origin: Origin
    stats: EngineStats = field(default_factory=EngineStats)
    versions: tuple[bytes, bytes] = UNVERSIONED
    in_flight: int = 0
    turns: float = 0.0
    answers: int = 0
    healthy: bool | None = None
    seen_well: bool = False
    misses: int = 0
    refusals: int = 0
    refused: bool = False
    failures: int = 0
    open_until: float = 0.0
    last_error: str | None = None
    fenced: str | None = None
    removed: bool = False
    lost_s: float | None = None
    returns: bool = False
    away: bool = False
    unasked: bool = False
    versions_known: bool = False
    restarts: int = 0
    deaths: tuple[Mapping[str, Any], ...] = ()
    last_scrape: tuple[float, dict[str, float]] | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def up(self) -> bool:
        """Whether it may be sent something now."""
        return self.is_up(time.monotonic())

    def is_up(self, now: float) -> bool:
        """Whether it may be sent something at `now`.

        After a cool-down one failure more is enough to leave it alone again.
        """
        return self.healthy is not False and not self.away and self.fenced is None and now >= self.open_until

    def is_last_resort(self) -> bool:
        """Say whether it is down, and nothing but silence speaks against it: where no engine is up, it is tried."""
        return self.fenced is None and not self.refused and not self.away

    def has_slot(self) -> bool:
        """Whether there is room for one request more."""
        return self.in_flight < self.config.max_in_flight

    def rank(self, affinity: bytes) -> float:
        """Rank it for what belongs together: the engine with the highest gets that.

        Weighted rendezvous hashing: each gets a share as large as its weight, and when one comes or goes, only what was
        its own moves.
        """
        digest = hashlib.blake2b(affinity + b"\0" + self.name.encode(), digest_size=8).digest()
        return -self.config.weight / math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1))

    def fence(self, reason: str) -> None:
        """Its weights are not those of the others: nothing is sent to it until an update succeeds."""
        if self.fenced is None:
            logger.warning("engine %s fenced off: %s", self.name, reason)
        self.fenced = self.last_error = reason

    def unfence(self) -> None:
        """Its weights are those of the others again."""
        if self.fenced is not None:
            logger.info("engine %s no longer fenced off", self.name)
        self.fenced = None

    def note_failure(self, reason: str, now: float, *, silent: bool = False) -> None:
        """Note that it could not be reached.

        One that breaks off is not left alone for it: the request may be to blame.
        """
        self.failures += 1
        self.last_error = reason
        if self.failures >= BREAK_AFTER:
            times = min(self.failures - BREAK_AFTER, 10)
            self.open_until = now + min(MAX_COOL_DOWN_S, COOL_DOWN_S * 2**times)
            self.refused = self.refused or not silent
            self._note_lost(f"{self.failures} connections in a row failed: {reason}")

    def note_success(self) -> None:
        """Note that it answered: the circuit breaker closes, and a loss that the log has is over."""
        self.answers += 1
        self.failures = 0
        self.open_until = 0.0
        if self.lost_s is not None and self.healthy is not False:
            logger.info("engine %s back after %.1f s", self.name, time.monotonic() - self.lost_s)
            self.lost_s = None

    def note_well(self) -> None:
        """Note that a health check succeeded."""
        self.healthy, self.seen_well, self.unasked = True, True, False
        self.misses, self.refusals, self.refused = 0, 0, False
        self.note_success()

    def note_miss(self, reason: str, enough: int, *, silent: bool) -> None:
        """Note a failed health check.

        It is down after `enough` of them in a row (1: this one is certain), or where none ever succeeded.
        """
        self.misses += 1
        self.refusals += not silent
        self.unasked = False
        self.last_error = reason
        if self.healthy is None:
            enough = 1
        if not silent and self.refusals >= enough:
            self.refused = True
        if self.misses >= enough:
            self.healthy = False
            self._note_lost(reason)

    def leave(self, reason: str) -> None:
        """Note that it has died, and may be started again."""
        self.away, self.healthy, self.refused, self.last_error = True, False, True, reason
        self._note_lost(reason)

    def note_unreachable(self, reason: str) -> None:
        """Note that it could not be connected to, and returns.

        Nothing is sent to it before a health check, or its successor.
        """
        self.healthy, self.refused, self.last_error = False, True, reason
        self._note_lost(reason)

    def remove(self) -> None:
        """Take it out: it is in the configuration no more. What is in flight finishes."""
        self.removed = True
        self.origin.close()
        logger.info("engine %s removed; requests in flight: %d", self.name, self.in_flight)

    def release(self) -> None:
        """Release the slot of a request of its own that has ended."""
        self.in_flight -= 1
        self.note_drained()

    def note_drained(self) -> None:
        """Note that the last request is gone of one that was removed."""
        if self.removed and not self.in_flight:
            logger.info("engine %s drained", self.name)

    def _note_lost(self, reason: str) -> None:
        if self.lost_s is None:
            self.lost_s = time.monotonic()
            self.stats.losses += 1
            logger.warning("engine %s lost: %s", self.name, reason)


def choose(free: list[Engine], affinity: bytes | None) -> Engine:
    """Choose the engine for a request, by weight either way.

    What belongs together gets the same one, else it is the least busy.

    The least busy has the least to do for its weight, and among idle ones it is the one that has had the least.
    Engines for which speculation pays at their load come first, then plain ones.
    """
    if len(free) == 1:
        return free[0]
    paying = [e for e in free if e.config.gamma_schedule and e.config.pays(e.in_flight + 1)]
    free = paying or [engine for engine in free if not engine.config.gamma_schedule] or free
    if affinity is not None:
        return max(free, key=lambda engine: engine.rank(affinity))
    return min(
        free, key=lambda e: ((e.in_flight + 1) / e.config.weight if e.in_flight else 0, e.turns / e.config.weight)
    )


def match(engines: Sequence[Engine], upstreams: Sequence[Upstream], *, renamed: bool) -> list[Engine | None]:
    """Match a configuration's upstreams with the engines that are there: by name and URL, then by the URL alone.

    Args:
        renamed: an engine may come under another name, with its fence and its versions.
    """
    left = [engine for engine in engines if not engine.removed]
    by_name = {(engine.name, engine.config.url): engine for engine in left}
    found = [by_name.get((upstream.name, upstream.url)) for upstream in upstreams]
    left = [engine for engine in left if renamed and engine not in found]
    for i, upstream in enumerate(upstreams):
        if found[i] is None and (same := next((e for e in left if e.config.url == upstream.url), None)) is not None:
            left.remove(same)
            found[i] = same
    return found
