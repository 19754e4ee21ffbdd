"""A model whose engine the gateway owns, as the scheduler sees it, and the requests that wait for it. No clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from laguna_serve.serving.gateway.telemetry.metrics import SECONDS, Distribution


class State(StrEnum):
    """Where a model is.

    A `draining` one takes no new requests, and goes when those in flight have ended. `failed` is an engine that could
    not be started, or died: it is left alone until its back-off is over.
    """

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADING = "unloading"
    ASLEEP = "asleep"
    FAILED = "failed"


class Outcome(StrEnum):
    """What became of a request that asked for a model."""

    WAITING = "waiting"
    GRANTED = "granted"
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    LEFT = "left"


RUNNING = frozenset((State.LOADING, State.READY, State.DRAINING, State.UNLOADING))
WAITABLE = frozenset((State.UNLOADED, State.ASLEEP))


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that wants a model. `cause` says why it failed; `settled` is called when it no longer waits."""

    model: OwnedModel
    since_s: float
    deadline_s: float
    settled: Callable[[], None]
    outcome: Outcome = Outcome.WAITING
    cause: str = ""
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How a model is kept.

    Attributes:
        group: whose memory it shares.
        planned_bytes: what it is taken to need before it was ever measured.
        pinned: it is loaded at the start, and goes only when somebody says so.
        idle_timeout_s: it goes after so long without requests; None: when its room is needed.
        min_residence_s: so long it may go on to take requests while another waits for its room; None: as long as its
            last load took.
        sleeps: its memory is given back without ending its processes.
    """

    group: str = "default"
    planned_bytes: int = 0
    pinned: bool = False
    idle_timeout_s: float | None = None
    min_residence_s: float | None = None
    sleeps: bool = False


@dataclass(slots=True, eq=False)
class OwnedModel:
    """A model's state.

    Attributes:
        measured_bytes: the most that it was seen to take; None before its first load.
        asleep_bytes: what it holds while asleep, and on its way out of there; 0 where it is awake or gone.
        in_flight: requests that it was granted to, and that have not ended.
        wanted: somebody asked for it without a request: it is loaded when there is room.
        leaving: somebody asked for its end: it goes as soon as nothing is in flight.
        removed: it is in the configuration no more.
        ready_s, used_s, began_s: when it became ready, was last used, last began to load; `load_s`: what that took.
        loads, wakes, failed, evictions: how often so far; to be woken is to be loaded, too.
        failures: starts and short lives in a row that failed; the next one waits until `retry_s`.
    """

    name: str
    terms: Terms
    state: State = State.UNLOADED
    measured_bytes: int | None = None
    asleep_bytes: int = 0
    in_flight: int = 0
    wanted: bool = False
    leaving: bool = False
    removed: bool = False
    waiting: list[Ticket] = field(default_factory=list)
    ready_s: float = 0.0
    used_s: float = 0.0
    began_s: float = 0.0
    load_s: float | None = None
    load_seconds: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    failures: int = 0
    retry_s: float = 0.0
    cause: str | None = None
    loads: int = 0
    wakes: int = 0
    failed: int = 0
    evictions: int = 0

    @property
    def need_bytes(self) -> int:
        """What it takes when it is loaded: measured, or planned before it was."""
        return self.terms.planned_bytes if self.measured_bytes is None else self.measured_bytes

    @property
    def held_bytes(self) -> int:
        """What it holds now, or will when it has been loaded."""
        if self.state in RUNNING:
            return self.asleep_bytes or self.need_bytes
        return self.asleep_bytes if self.state is State.ASLEEP else 0

    @property
    def serves(self) -> bool:
        """Whether a request would be granted it now."""
        return self.state is State.READY and not self.leaving

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return self.in_flight > 0

    def find_residence_end(self) -> float:
        """Until when a busy one need not make room."""
        least = self.terms.min_residence_s
        return self.ready_s + (least if least is not None else min(self.load_s or 0.0, MOST_RESIDENCE_S))


# Of a model without a min_residence_s, however long its load took.
MOST_RESIDENCE_S = 60.0
