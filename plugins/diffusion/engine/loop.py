"""The engine's thread: takes requests from the queue, runs passes, delivers what they bring, and lets requests go.

`submit` and `cancel` may be called from any thread. Everything else of a request happens in the engine's own, so that
there is nothing to lock but the queue. What ends the thread (a card that is gone, a defect) is the engine's death: all
requests end with an error, and `alive` says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from laguna_serve.plugins.diffusion.engine.batch import Advance, Batch, Job
from laguna_serve.plugins.diffusion.engine.metrics import EngineMetrics
from laguna_serve.plugins.diffusion.engine.requests import (
    Committed,
    Deliver,
    EngineStoppedError,
    Finished,
    Limits,
    QueueFullError,
    Reason,
    Request,
)
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.speculation import Decoder

logger = logging.getLogger(__name__)


class Handle:
    """A request that was submitted, for whoever did."""

    def __init__(self, engine: Engine, request: Request, deliver: Deliver, now: float) -> None:
        self.request, self.deliver, self.submitted_s = request, deliver, now
        self.last_s: float | None = None
        self.cancelled: Reason | None = None
        self._engine = engine

    def cancel(self, reason: Reason = "abort") -> None:
        """End it before the next pass, if it has not ended; its last event then has this reason."""
        self._engine.cancel(self, reason)


class Engine:
    """Serves requests with one decoder, until it is stopped.

    Attributes:
        cause: of its death, in a line; None while it lives, or where it was stopped.
    """

    def __init__(
        self,
        decoder: Decoder,
        metrics: EngineMetrics,
        limits: Limits,
        *,
        on_death: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare it; nothing runs before `start`.

        Args:
            decoder: takes the requests forward.
            metrics: to count in.
            limits: of what it takes.
            on_death: called in the engine's thread when it dies.
            clock: seconds, for the metrics.
        """
        self.metrics = metrics
        self.cause: str | None = None
        self._batch = Batch(decoder)
        self._limits = limits
        self._on_death, self._clock = on_death, clock
        self._changed = threading.Condition()
        self._waiting: deque[Handle] = deque()
        self._running: dict[Job, Handle] = {}
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._work, name="diffusion-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def most(self) -> int:
        """How many requests it takes at once: those that run and those that wait."""
        return self._limits.running + self._limits.waiting

    def start(self) -> None:
        """Start the thread that serves."""
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Queue a request; its events are given to `deliver` in the engine's thread.

        Raises:
            DiffusionError: it is longer than the model's sequences, or of another cache or guidance than the engine's.
            QueueFullError: too many wait.
            EngineStoppedError: the engine has died, or takes no more.
        """
        self._check(request)
        handle = Handle(self, request, deliver, self._clock())
        with self._changed:
            if self._draining or self._stopping or not self.alive:
                raise EngineStoppedError(self.cause or "the engine is being stopped")
            if len(self._running) + len(self._waiting) >= self.most:
                raise QueueFullError(f"expected at most {self._limits.waiting} requests to wait, got one more")
            self._waiting.append(handle)
            self.metrics.show_load(len(self._running), len(self._waiting))
            self._changed.notify()
        return handle

    def cancel(self, handle: Handle, reason: Reason = "abort") -> None:
        """End a request before the next pass; one that waits, at once."""
        with self._changed:
            handle.cancelled = reason
            waited = handle in self._waiting
            if waited:
                self._waiting.remove(handle)
                self.metrics.show_load(len(self._running), len(self._waiting))
            self._changed.notify()
        if waited:
            self._finish(handle, reason)

    def drain(self) -> None:
        """Take no more requests; the thread ends with the last of those that are there."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more requests, and end those that are there before the next pass."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; False if it did not come in time."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self.alive

    def _has_room(self, request: Request) -> bool:
        """Say whether one more fits beside those that run; the first that waits is the next, so that none starves."""
        limits, requests = self._limits, [request, *(handle.request for handle in self._running.values())]
        return (
            len(requests) <= limits.running
            and (limits.tokens is None or sum(map(_measure, requests)) <= limits.tokens)
            and (limits.open_positions is None or sum(map(_count_open, requests)) <= limits.open_positions)
        )

    def _check(self, request: Request) -> None:
        predictor, reference, canvas = self._batch.decoder.predictor, request.reference, request.canvas
        if (reference.cache, reference.guidance) != (predictor.cache, predictor.guidance):
            got = f"cache {reference.cache}, guidance {reference.guidance}"
            raise DiffusionError(
                f"request: expected cache {predictor.cache}, guidance {predictor.guidance}, as all have, got {got}"
            )
        limits = self._limits
        longest = min(limits.sequence, limits.tokens or limits.sequence)
        if _measure(request) > longest:
            most = f"at most {longest} tokens of prompt and canvas"
            got = f"{len(canvas.prompt)} and {canvas.length}"
            raise DiffusionError(f"request: expected {most}, got {got}; shorten one of them")
        if limits.open_positions is not None and _count_open(request) > limits.open_positions:
            expected = f"at most {limits.open_positions}, whose logits have room in memory"
            raise DiffusionError(f"block_length: expected {expected}, got {_count_open(request)}; lower it")
        if not all(0 <= token < limits.vocabulary for token in canvas.prompt):
            raise DiffusionError(f"prompt: expected ids from 0 to {limits.vocabulary - 1}, got others; check them")

    def _work(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException as error:
            logger.exception("the engine has died")
            self.cause = f"{type(error).__name__}: {error}"
        finally:
            self._end_all()
            if self.cause is not None and self._on_death is not None:
                self._on_death()

    def _take_in(self) -> bool:
        """Drop what was cancelled and admit what there is room for; False when there is nothing to do any more."""
        with self._changed:
            while True:
                if self._stopping:
                    return False
                gone = [(job, handle) for job, handle in self._running.items() if handle.cancelled]
                for job, _ in gone:
                    self._release(job)
                while self._waiting and self._has_room(self._waiting[0].request):
                    handle = self._waiting.popleft()
                    self._running[self._batch.add(handle.request)] = handle
                    self.metrics.count_prompt(len(handle.request.canvas.prompt))
                self.metrics.show_load(len(self._running), len(self._waiting))
                for _, handle in gone:
                    self._finish(handle, handle.cancelled or "abort")
                if self._running:
                    return True
                if self._draining:
                    return False
                self._changed.wait()

    def _step(self) -> None:
        """Run a pass and deliver what it brings; a function of its own, so that no name keeps a request afterwards."""
        before = self._batch.totals
        advances = self._batch.advance()
        self.metrics.count_pass(before, self._batch.totals)
        for advance in advances:
            self._deliver(advance)

    def _deliver(self, advance: Advance) -> None:
        handle = self._running[advance.job]
        if advance.reason is not None:
            del self._running[advance.job]
            self.metrics.show_load(len(self._running), len(self._waiting))
        if advance.tokens:
            now = self._clock()
            self.metrics.count_tokens(len(advance.tokens), handle.submitted_s, handle.last_s, now)
            handle.last_s = now
            self._tell(handle, Committed(advance.tokens, advance.likelihoods))
        if advance.reason is not None:
            self._finish(handle, advance.reason, advance.error)

    def _tell(self, handle: Handle, event: Committed) -> None:
        """Give a request's tokens to who waits for them; who cannot be told is gone."""
        try:
            handle.deliver(event)
        except Exception:
            logger.exception("a request's tokens could not be delivered: it is ended")
            handle.cancelled = "abort"

    def _finish(self, handle: Handle, reason: Reason, error: str | None = None) -> None:
        self.metrics.count_end(reason, handle.submitted_s, self._clock())
        with suppress(Exception):  # nobody is there to be told
            handle.deliver(Finished(reason, error))

    def _release(self, job: Job) -> None:
        del self._running[job]
        self._batch.remove(job)

    def _end_all(self) -> None:
        with self._changed:
            self._stopping = True
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._batch.jobs.clear()
            self.metrics.show_load(0, 0)
        for handle in left:
            self._finish(handle, "abort" if self.cause is None else "error", self.cause)


def _measure(request: Request) -> int:
    """Tokens of prompt and canvas."""
    return len(request.canvas.prompt) + request.canvas.length


def _count_open(request: Request) -> int:
    """Positions that get logits in a pass."""
    return request.canvas.block_length
