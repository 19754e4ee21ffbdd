"""Keeps one engine running: when it dies, the cause is announced and it is started again, later and later.

An engine that dies soon after every start is given up: what kills it (a broken driver, one request that a client
repeats) would kill it for ever. Its log is moved aside before each start, so that the cause is still there to read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import msgspec

from laguna_serve.serving.engine.engine import Engine
from laguna_serve.serving.planning.launch import EngineError
from laguna_serve.serving.supervision.log_file import rotate

REMEMBERED = 20


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When an engine is started again.

    Attributes:
        first_s: the wait after the first quick failure; it doubles with every further one.
        max_s: the longest wait.
        quick_s: an engine that served this long is sound: its death does not count as quick.
        max_quick: so many quick failures in a row, starts that failed among them, and the engine is given up.
    """

    first_s: float = 1.0
    max_s: float = 60.0
    quick_s: float = 300.0
    max_quick: int = 5

    def find_delay(self, quick: int) -> float:
        """Seconds to wait after so many quick failures in a row."""
        return min(self.max_s, self.first_s * 2.0 ** (quick - 1))


class Death(msgspec.Struct, frozen=True):
    """An engine's end. `served_s`: how long it had served, None where it never answered."""

    time: str
    cause: str
    served_s: float | None


class Keeper:
    """One engine after the other, as a context manager; `engine` is the one of now.

    Entering starts the first and raises EngineError when that fails: what never worked is not tried again.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        policy: RestartPolicy,
        announce: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._make, self._policy, self._announce, self._clock, self._sleep = make, policy, announce, clock, sleep
        self.engine = make()
        self.restarts = 0
        self.deaths: deque[Death] = deque(maxlen=REMEMBERED)
        self._ready_since: float | None = None
        self._quick = 0

    def __enter__(self) -> Keeper:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.stop()

    @property
    def away(self) -> bool:
        """Whether there is no engine now: it has died, and none serves in its place yet."""
        return self._ready_since is None

    def note_death(self, error: EngineError) -> None:
        """Note that the engine has died of this: what is left of it is ended."""
        served_s = None if self._ready_since is None else self._clock() - self._ready_since
        rounded = None if served_s is None else round(served_s, 1)
        self.deaths.append(Death(datetime.now(UTC).isoformat(timespec="seconds"), str(error), rounded))
        if served_s is not None and served_s >= self._policy.quick_s:
            self._quick = 0
        self._quick += 1
        self._ready_since = None
        self.engine.stop()

    def revive(self) -> None:
        """After `note_death`: start it again, as often as it takes.

        Raises:
            EngineError: it failed too often in a row; the last cause.
        """
        policy = self._policy
        while True:
            cause = self.deaths[-1].cause
            if self._quick >= policy.max_quick:
                often = f"{self._quick} failures in a row, each within {policy.quick_s:.0f} s of its start"
                raise EngineError(f"{cause}; given up after {often}")
            delay = policy.find_delay(self._quick)
            count = f"failure {self._quick} of {policy.max_quick} in a row"
            self._announce(f"{cause}; starting it again in {delay:.0f} s ({count})")
            self._sleep(delay)
            self.engine = self._make()
            try:
                self._start()
            except EngineError as error:
                self.note_death(error)
                continue
            self.restarts += 1
            return

    def _start(self) -> None:
        with contextlib.suppress(OSError):  # the engine says what is wrong with its log
            rotate(self.engine.log_path)
        self.engine.__enter__()
        self._ready_since = self._clock()
