"""One engine of the gateway's own: started, warmed up, measured, put to sleep, ended. It blocks: called in threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from laguna_serve.serving.chat.sampling_defaults import find_temperature
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.engine import Engine, EngineError
from laguna_serve.serving.engine.figures import read_figures, read_freed
from laguna_serve.serving.engine.spare import Spares
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.residence import sleep
from laguna_serve.serving.gateway.residence.plans import make_engine_config
from laguna_serve.serving.gateway.residence.routes import Routes
from laguna_serve.serving.machine.memory import process_memory
from laguna_serve.serving.planning.budget import GPU_CONTEXT_BYTES
from laguna_serve.serving.planning.launch import require_device
from laguna_serve.serving.supervision.log_file import rotate

WARM_UP_S = 600.0
logger = logging.getLogger(__name__)


class Launched(Protocol):
    """What the owner needs of an engine. `start` and `wake` return the bytes that it takes, `sleep` those that stay."""

    def start(self) -> int:
        """Start it, and let it answer once. Raises EngineError."""

    def wake(self) -> int:
        """Give it its memory back. Raises EngineError."""

    def sleep(self) -> int:
        """Take its memory. Raises EngineError."""

    def stop(self) -> None:
        """End all its processes; at any time, also while it starts."""

    def measure(self) -> int:
        """Measure the bytes that it takes now."""

    def is_dead(self) -> bool:
        """Say whether it has ended by itself."""

    def describe_death(self) -> str:
        """Describe why, in a line; it may take a moment."""

    @property
    def url(self) -> str: ...


MakeEngine = Callable[[str, OwnedEngine, Path], Launched]


def describe_upstream(engine: Launched, table: OwnedEngine, routes: Routes) -> dict[str, str | float | None]:
    """Describe where an engine answers, and what of its requests nobody states; `routes` learns which it lacks."""
    routes.learn(table, engine.url)
    return {"url": engine.url, "default_temperature": find_temperature(table.model, table.extra_args)}


class OwnedProcess:
    """An engine through `serving/engine`: a process group with a supervisor, which ends it when the gateway ends."""

    def __init__(self, name: str, table: OwnedEngine, log: Path, spares: Spares | None = None) -> None:
        self._name, self._table, self._log, self._spares = name, table, log, spares
        self._engine: Engine | None = None
        self._stopped = threading.Event()

    @property
    def url(self) -> str:
        """Where it answers, once started."""
        assert self._engine is not None
        return self._engine.base_url

    def start(self) -> int:
        """Start it, wait until it answers, and let it answer a request."""
        with contextlib.suppress(OSError):
            rotate(self._log)
        try:
            config = make_engine_config(self._name, self._table)
            if self._table.sleep_level:
                sleep.require_support(require_device(), self._table)
        except CheckpointError as error:
            raise EngineError(str(error)) from None
        engine = self._engine = Engine(
            config,
            log_path=self._log,
            ready_timeout_s=self._table.start_timeout_s,
            announce=logger.info,
            spares=self._spares,
        )
        if self._stopped.is_set():
            raise EngineError(f"engine {self._name}: expected it to start, got the end of the gateway; start it again")
        engine.__enter__()
        try:
            warm_up(engine.base_url, self._name)
        except EngineError:
            engine.check()  # its death says more
            raise
        return self.measure()

    def wake(self) -> int:
        """Wake it, with the weights that it had; an answer tells that it works."""
        sleep.wake(self.url, self._table)
        warm_up(self.url, self._name)
        return self.measure()

    def sleep(self) -> int:
        """Put it to sleep, and measure what it keeps; where the driver does not tell, by what it says to have freed."""
        awake = self.measure()
        sleep.put_to_sleep(self.url, self._table.sleep_level)
        kept = self.measure()
        freed = read_freed(self._log) if kept == awake else None
        return kept if freed is None else max(GPU_CONTEXT_BYTES, awake - freed)

    def stop(self) -> None:
        """End every process of it."""
        self._stopped.set()
        if self._engine is not None:
            self._engine.stop()

    def measure(self) -> int:
        """Measure its processes: on a GPU what they hold there, else what the machine would get back.

        Where the driver does not tell processes apart (in containers) the engine's own log counts.
        """
        assert self._engine is not None
        memory = process_memory(self._engine.pids())
        if memory.gpu_bytes:
            return memory.gpu_bytes
        if memory.gpu_bytes is not None:
            said = read_figures(self._log)
            parts = (said.weights_bytes, said.kv_cache_bytes, said.graphs_bytes, said.peak_activation_bytes)
            if said.graphs_bytes is not None or said.peak_activation_bytes is not None:
                return sum(filter(None, parts)) + GPU_CONTEXT_BYTES
        return memory.pss_bytes

    def is_dead(self) -> bool:
        """Say whether a process that it needs is gone."""
        return self._engine is not None and not self._stopped.is_set() and self._engine.is_dead()

    def describe_death(self) -> str:
        """Describe how it ended, from its exit and its log."""
        assert self._engine is not None
        return self._engine.describe_death()


def warm_up(url: str, name: str) -> None:
    """Ask for one token, so that the first client does not pay for what an engine does once.

    A model that has no completions refuses, which is an answer too. Raises EngineError.
    """
    started = time.monotonic()
    status = sleep.post(url, "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}, WARM_UP_S)
    if status >= 500:
        raise EngineError(f"engine {name}: expected an answer to its first request, got HTTP {status}; see its log")
    logger.info("engine %s: answered its first request after %.1f s", name, time.monotonic() - started)
