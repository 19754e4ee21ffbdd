"""Carries out what the scheduler decides: engines are started and ended in threads, the rest is the event loop's.

A model's engine is in its pool from the moment in which it has answered its first request until the moment in which it
is ended; in between nothing but its scheduler decides who may use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.engine.spare import Spares
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.config.tables import Model, Upstream
from laguna_serve.serving.gateway.residence.launcher import Launched, MakeEngine, OwnedProcess, describe_upstream
from laguna_serve.serving.gateway.residence.model import OwnedModel, State, Terms, Ticket
from laguna_serve.serving.gateway.residence.plans import find_log, plan_bytes
from laguna_serve.serving.gateway.residence.routes import Routes
from laguna_serve.serving.gateway.residence.scheduler import Act, Scheduler
from laguna_serve.serving.machine.memory import GIB, show_size
from laguna_serve.serving.planning.launch import require_device

# How often it is looked whether engines live, and how often they are measured.
WATCH_S, MEASURE_S = 0.5, 10.0
# Between two looks whether what is under way at the end has ended.
STOP_POLL_S = 0.1
# Loads and ends at once: they wait, most of the time.
THREADS = 64
# Of the memory that is free at the start, for a group without a size.
DEFAULT_SHARE = 0.9
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Owner:
    """The engines that a gateway owns.

    `place` is told where a model's engine is, and None when it is about to end: nothing may be sent there any more.
    """

    def __init__(self, make: MakeEngine | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler, self.routes, self._spares = Scheduler(), Routes(), Spares()
        self.place: Callable[[str, Upstream | None], None] = lambda _name, _upstream: None
        self._make, self._clock = make or partial(OwnedProcess, spares=self._spares), clock
        self._config: Config | None = None
        self._models: dict[str, Model] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._engines: dict[str, Launched] = {}
        self._planned: dict[tuple[str, OwnedEngine], int] = {}
        self._free_bytes: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._closing = False

    def complete(self, config: Config) -> Sequence[Model]:
        """List a configuration's models, with the engines that run now in the place of those that are nowhere."""
        return [self._complete_model(model) for model in config.models]

    def configure(self, config: Config) -> None:
        """Take a configuration.

        A model whose engine is to be another one from now on is ended when nothing is in flight.
        """
        owned = {model.name: model for model in config.models if model.engine is not None}
        known = owned.keys() & self._models.keys()
        changed = {name for name in known if self._models[name].engine != owned[name].engine}
        self._config = config
        self._spares.want(config.server.spare_process and len(owned) > 1)
        self._models = self._models | owned
        engines = {name: model.engine for name, model in owned.items() if model.engine is not None}
        terms = {name: self._make_terms(name, engine) for name, engine in engines.items()}
        self.scheduler.configure(terms, self._find_budgets(config) if owned else {})
        for name in changed:
            model = self.scheduler.models[name]
            model.leaving, model.measured_bytes, model.retry_s = model.state is not State.UNLOADED, None, 0.0
        if self.scheduler.models:
            self._drive_soon()

    def find(self, name: str) -> OwnedModel | None:
        """Find a model by its name, if its engine is the gateway's."""
        model = self.scheduler.models.get(name)
        return None if model is None or model.removed else model

    def is_well(self, name: str) -> bool:
        """Whether a model is the gateway's own, and a request would get it, sooner or later."""
        model = self.find(name)
        return model is not None and model.state is not State.FAILED

    def ask(self, model: OwnedModel, timeout_s: float, settled: Callable[[], None]) -> Ticket:
        """Ask for a model for a request; `leave` gives it back."""
        now, was_ready = self._clock(), model.serves
        ticket = self.scheduler.ask(model, now, now + timeout_s, settled)
        if not was_ready:
            self.drive()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Note that a request has ended, or waits no more."""
        if self.scheduler.leave(ticket, self._clock()):
            self.drive()

    def load(self, model: OwnedModel) -> None:
        """Load a model without a request, one that is to go afterwards; one that has failed is tried again at once."""
        model.wanted = model.leaving or model.state not in (State.LOADING, State.READY, State.DRAINING)
        model.retry_s = min(model.retry_s, self._clock())
        self.drive()

    def unload(self, model: OwnedModel) -> None:
        """End a model's engine as soon as nothing is in flight."""
        model.wanted, model.leaving = False, model.state not in (State.UNLOADED, State.FAILED)
        self.drive()

    def pin(self, model: OwnedModel, *, pinned: bool) -> None:
        """Keep a model, or let it go when its room is needed, until the configuration is read again."""
        model.terms = replace(model.terms, pinned=pinned)
        self.drive()

    def drive(self) -> None:
        """Let what has happened take effect."""
        if self._closing:
            return
        loop, now = asyncio.get_running_loop(), self._clock()
        for act, model in self.scheduler.advance(now):
            self._start_task(self._carry_out(act, model))
        if self._timer is not None:
            self._timer.cancel()
        wake = self.scheduler.find_wake(now)
        self._timer = None if wake is None else loop.call_later(max(0.0, wake - now), self.drive)

    async def stop(self) -> None:
        """End all engines; return when none is left."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        while self._engines or self._tasks:
            await asyncio.gather(*(self._run(engine.stop) for engine in self._engines.values()))
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=STOP_POLL_S)
            else:
                self._engines.clear()
        await self._run(self._spares.close)
        if self._threads is not None:
            self._threads.shutdown()

    async def _carry_out(self, act: Act, model: OwnedModel) -> None:
        if act == "load":
            await self._load(model)
        else:
            await self._end(model, asleep=act == "sleep")
        self.drive()

    async def _load(self, model: OwnedModel) -> None:
        self._begin_watch()
        engine = self._engines.get(model.name)
        table = self._models[model.name].engine
        assert table is not None
        try:
            if engine is None:
                port = 0 if self._config is None else self._config.server.port
                engine = self._engines[model.name] = self._make(model.name, table, find_log(model.name, table, port))
                logger.info("model %s: loading, planned with %s", model.name, show_size(model.need_bytes))
                size = await self._run(engine.start)
            else:
                logger.info("model %s: waking", model.name)
                size = await self._run(engine.wake)
        except Exception as error:
            cause = str(error)
            if not isinstance(error, EngineError):
                logger.exception("model %s: the load failed in the gateway", model.name)
                cause = f"engine {model.name}: expected it to start, got {error!r}"
            await self._forget(model)
            self.scheduler.note_failed(model, cause, self._clock())
            if not self._closing:
                logger.warning(
                    "model %s: not loaded: %s; left alone for %g s", model.name, cause, model.retry_s - self._clock()
                )
            return
        found = await asyncio.to_thread(describe_upstream, engine, table, self.routes)
        stand_in = self._models[model.name].upstreams[0]
        upstream = self._upstreams[model.name] = stand_in.model_copy(update=found)
        self.place(model.name, upstream)
        self.scheduler.note_ready(model, size, self._clock())
        logger.info("model %s: ready after %.1f s with %s", model.name, model.load_s or 0.0, show_size(size))

    async def _end(self, model: OwnedModel, *, asleep: bool) -> None:
        self._withdraw(model)
        engine = self._engines.get(model.name)
        if asleep and engine is not None:
            try:
                left = await self._run(engine.sleep)
            except EngineError as error:
                logger.warning("model %s: not put to sleep: %s; ended instead", model.name, error)
            else:
                self.scheduler.note_unloaded(model, left)
                logger.info("model %s: asleep, keeps %s", model.name, show_size(left))
                return
        await self._forget(model)
        self.scheduler.note_unloaded(model)
        logger.info("model %s: unloaded", model.name)

    async def _bury(self, model: OwnedModel, engine: Launched) -> None:
        """One that has ended by itself."""
        cause = await self._run(engine.describe_death)
        await self._forget(model)
        self.scheduler.note_failed(model, cause, self._clock())
        logger.warning("model %s: %s; started again when asked for", model.name, cause)
        self.drive()

    async def _forget(self, model: OwnedModel) -> None:
        self._withdraw(model)
        if (engine := self._engines.get(model.name)) is not None:
            await self._run(engine.stop)
            self._engines.pop(model.name, None)

    def _withdraw(self, model: OwnedModel) -> None:
        if self._upstreams.pop(model.name, None) is not None:
            self.place(model.name, None)

    def _begin_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._watch_forever())

    async def _watch_forever(self) -> None:
        measured_s = self._clock()
        while True:
            await asyncio.sleep(WATCH_S)
            for model in list(self.scheduler.models.values()):
                engine = self._engines.get(model.name)
                serving = model.state in (State.READY, State.DRAINING, State.ASLEEP)
                if engine is not None and serving and engine.is_dead():
                    self._withdraw(model)
                    self.scheduler.note_death(model)
                    self._start_task(self._bury(model, engine))
            if self._clock() - measured_s >= MEASURE_S:
                await self._measure_all()
                measured_s = self._clock()

    async def _measure_all(self) -> None:
        for model in list(self.scheduler.models.values()):
            engine = self._engines.get(model.name)
            if engine is not None and model.state is State.READY:
                size = await self._run(engine.measure)
                if model.state is State.READY:
                    self.scheduler.note_memory(model, size)
        self.drive()

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Callable[[], Result]) -> Result:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "engine")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _drive_soon(self) -> None:
        """Let what a configuration changes take effect when its pools are there."""
        with contextlib.suppress(RuntimeError):  # there is no loop yet: the first request drives
            asyncio.get_running_loop().call_soon(self.drive)

    def _complete_model(self, model: Model) -> Model:
        if model.engine is None:
            return model
        upstream = self._upstreams.get(model.name)
        return model.model_copy(update={"upstreams": () if upstream is None else (upstream,)})

    def _make_terms(self, name: str, table: OwnedEngine) -> Terms:
        key = (name, table)
        if key not in self._planned:
            self._planned[key] = plan_bytes(name, table)
            if not self._planned[key]:
                known = "what it takes is not known before its first load, which makes no room; give memory_gib"
                logger.warning("model %s: %s", name, known)
        return Terms(
            group=table.group,
            planned_bytes=self._planned[key],
            pinned=table.pinned,
            idle_timeout_s=table.idle_timeout_s,
            min_residence_s=table.min_residence_s,
            sleeps=table.sleep_level > 0,
        )

    def _find_budgets(self, config: Config) -> dict[str, int]:
        given = {group.name: group.memory_gib for group in config.groups}
        used = {model.engine.group for model in config.models if model.engine is not None}
        sizes = {name: given.get(name) for name in used}
        return {name: self._find_free() if size is None else int(size * GIB) for name, size in sizes.items()}

    def _find_free(self) -> int:
        """Find what was free when it was first asked: afterwards engines are in it."""
        if self._free_bytes is None:
            try:
                self._free_bytes = int(require_device().free_bytes * DEFAULT_SHARE)
            except EngineError:
                self._free_bytes = 0
        return self._free_bytes
