"""New weights for all engines of a model, or for none.

The steps are vLLM's own endpoints under their own names (vllm/entrypoints/rl/online/api_router.py, checked against
0.32; the engines need VLLM_SERVER_DEV_MODE=1). While they run, requests wait in the gateway's queue. What holds after
any failure: the model is served by engines that have the version it had before, and that were not touched or were
brought back to it and checked; the others are fenced off, until an update succeeds on all. That may leave none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import aiohttp

from laguna_serve.serving.gateway.engines import digests
from laguna_serve.serving.gateway.engines.engine import LEFT_PAUSED, Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.update import (
    Params,
    Part,
    PauseMode,
    RefusedError,
    StepError,
    Update,
    UpdateRequest,
    find_outcome,
    make_report,
)
from laguna_serve.serving.gateway.wire.failures import find_message
from laguna_serve.serving.kit.results import JsonObject

TIMEOUT_S = 600.0
START: Mapping[Part, str] = {"update": "/start_weight_update", "draft_update": "/start_draft_weight_update"}
# Keys and values of the old weights must not be attended to with the new ones: requests that are held in the middle
# are computed again up to where they were.
RESET = "/reset_prefix_cache"
RESET_ALL = {"reset_running_requests": "true"}
# vLLM 0.29 and newer have it; where it is missing, an update with a version is refused before anything is touched.
VERSION_PATH = "/weight_info"
# Why an update has to bring whole weights with a name, where the gateway has given its engines none before.
DIFFERENT = "engines have different weights, or have not said which"


class WeightGroup:
    """The engines of a model, as far as their weights go. One update at a time. `session` keeps no connection."""

    def __init__(self, pool: Pool, session: aiohttp.ClientSession) -> None:
        self.pool, self._session = pool, session
        # Parts that an update began to change, until one has brought all engines to the same: such an engine is fenced
        # off when requests go on.
        self._changed: dict[Engine, set[Part]] = {}
        self.opened = set[Engine]()  # an update has been started, and not finished
        self._part: Part = "update"  # of the steps that come one by one
        self.lock = asyncio.Lock()
        self._beside: asyncio.Task[None] | None = None

    async def pause(self, mode: PauseMode) -> None:
        """Hold new requests in the queue, and pause every engine. Raises StepError: nothing is paused then."""
        self.pool.pause()
        try:
            await self.call("/pause", self.pool.engines, params={"mode": mode})
        except StepError as error:
            # One whose answer was lost may be paused all the same; one that has no such route is not.
            await self.resume([e for e in self.pool.engines if not error.errors.get(e, "").startswith("HTTP 404")])
            raise

    async def resume(self, engines: Sequence[Engine] | None = None) -> None:
        """Every engine goes on, or those given. One that cannot is fenced off, and one in the middle of an update."""
        self.fence_changed()
        gone = [engine for engine in self.pool.held if engine not in self.pool.engines]
        try:
            await self.call("/resume", self.pool.engines if engines is None else engines)
        except StepError as error:
            for engine, reason in error.errors.items():
                if engine.fenced is None:
                    engine.fence(LEFT_PAUSED)
                engine.last_error = f"/resume: {reason}"
        finally:
            self.pool.resume()
            if gone:  # taken out by a reload meanwhile, and with requests to finish; nobody waits for them
                self._beside = asyncio.create_task(self._let_go_on(gone))

    async def _let_go_on(self, engines: Sequence[Engine]) -> None:
        with contextlib.suppress(StepError):
            await self.call("/resume", engines)

    async def start(self, part: Part) -> None:
        """Begin an update on every engine. Raises RefusedError: it must bring more; StepError: they are fenced off."""
        if part == "draft_update" and not self.pool.adopt_versions():
            raise RefusedError(f"{START[part][1:]}: expected an update of the model, as {DIFFERENT}")
        self._part = part
        await self.close(self.pool.engines)
        self.opened |= set(self.pool.engines)
        await self._step(START[part])

    async def update(self, info: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
        """One body of `/update_weights` to every engine. Raises RefusedError: there is none under way; StepError."""
        self._check_opened("update_weights")
        await self._step("/update_weights", {"update_info": info})

    async def finish(self, weight_version: str | None, draft_version: str | None) -> None:
        """End it, and check that every engine says the same version. Raises as `update`."""
        self._check_opened("finish_weight_update")
        if not self.pool.adopt_versions() and weight_version is None:
            raise RefusedError(f"finish_weight_update: expected a weight_version, as {DIFFERENT}")
        await self._step("/finish_weight_update", {"weight_version": weight_version})
        self.opened.difference_update(self.pool.engines)
        await self._guarded(lambda: self.call(RESET, self.pool.engines, params=RESET_ALL))
        parts: set[Part] = {self._part}
        if weight_version is not None:
            await self._guarded(lambda: self.verify(self.pool.engines, weight_version))
            parts.add("weight_version")
        self.settle(parts, weight_version, draft_version)

    async def apply(self, request: UpdateRequest) -> JsonObject:
        """Carry out the whole of it: pause, update, verify, resume. Returns what became of it, JSON-ready."""
        parts = request.list_parts()
        needed, why = self._list_needed(), "engines are fenced off"
        if not self.pool.adopt_versions():
            needed, why = needed | {"update", "weight_version"}, DIFFERENT
        if missing := needed - parts:
            fault = f"expected {' and '.join(sorted(missing))}, as {why}, got none; give whole weights"
            return make_report(self.pool, "unchanged", f"update: {fault}")
        try:
            if request.weight_version is not None:
                await self.call(VERSION_PATH, self.pool.engines, method="GET")  # what will be asked at the end
            if request.digests:
                await self.call(digests.PATH, self.pool.engines, digests.PROBE)
            await self.pause(request.mode)
        except StepError as error:
            return make_report(self.pool, "unchanged", str(error))
        try:
            await self._load(request, self.pool.engines)
            if request.digests:
                await self.compare(self.pool.engines)
            self.settle(parts, request.weight_version, request.draft_version)
            return make_report(self.pool, "updated", None)
        except StepError as error:
            if request.rollback is not None:
                await self._roll_back(request.rollback, check=request.digests)
            self.fence_changed()
            return make_report(self.pool, find_outcome(self.pool), str(error))
        finally:
            await self.resume()

    async def call(
        self,
        path: str,
        engines: Sequence[Engine],
        body: Mapping[str, object] | None = None,
        params: Params | None = None,
        method: str = "POST",
    ) -> dict[Engine, Any]:
        """Ask several engines the same at once; their answers. Raises StepError when one has none."""
        return await self._gather(path, {e: self._ask(method, e, path, body, params) for e in engines})

    async def call_each(self, path: str, bodies: Mapping[Engine, Mapping[str, object]]) -> dict[Engine, Any]:
        """POST to several engines at once, each with a body of its own; their answers. Raises StepError as `call`."""
        return await self._gather(path, {e: self._ask("POST", e, path, body, None) for e, body in bodies.items()})

    async def _gather(self, path: str, asked: Mapping[Engine, Awaitable[Any]]) -> dict[Engine, Any]:
        answers = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        if errors := {engine: str(a) for engine, a in answers.items() if isinstance(a, OSError)}:
            raise StepError(path, errors)
        return answers

    async def _load(self, update: Update, engines: Sequence[Engine]) -> None:
        await self.close(engines)
        for part, start in START.items():
            if bodies := getattr(update, part):
                self.note_changed(engines, part)
                self.opened |= set(engines)
                await self.call(start, engines)
                for body in bodies:
                    await self.call("/update_weights", engines, {"update_info": body})
                version = update.weight_version if part == "update" else None
                await self.call("/finish_weight_update", engines, {"weight_version": version})
                self.opened.difference_update(engines)
                await self.call(RESET, engines, params=RESET_ALL)
        if update.weight_version is not None:
            self.note_changed(engines, "weight_version")
            if not update.update:
                await self.call("/update_weight_version", engines, {"new_version": update.weight_version})
            await self.verify(engines, update.weight_version)

    async def _roll_back(self, update: Update, *, check: bool) -> None:
        """Every changed engine on its own: one that cannot be brought back is no reason to give up another.

        With `check` they must show the same digests then.
        """
        if self.pool.adopt_versions():  # else each had its own, and this must say what it brings
            update = update.model_copy(update={"weight_version": self.pool.versions[0].decode()})
        if (version := update.weight_version) is None:
            return
        restored = list[Engine]()
        for engine, changed in self._changed.items():
            if engine.removed or changed - update.list_parts():
                continue
            with contextlib.suppress(StepError):
                await self._load(update, [engine])
                restored.append(engine)
        if check and restored:
            try:
                await self.compare(restored)
            except StepError:  # which of them are right is not known
                return
        for engine in restored:
            engine.versions = (version.encode(), engine.versions[1])
            del self._changed[engine]

    async def close(self, engines: Iterable[Engine]) -> None:
        """End what was started and not finished: vLLM starts nothing else meanwhile.

        If it cannot be finished, it ends by a body that says nothing, which is refused.
        """
        for engine in self.opened.intersection(engines):
            await self._ask("POST", engine, "/finish_weight_update", {}, None)
            await self._ask("POST", engine, "/update_weights", {"update_info": {}}, None)
            self.opened.discard(engine)

    def settle(
        self,
        parts: Collection[Part],
        weight_version: str | None,
        draft_version: str | None,
        engines: Collection[Engine] | None = None,
    ) -> None:
        """Note that all engines, or those given, have these parts, and let them say so from now on.

        One that another part is still unknown of does not.
        """
        reached = self.pool.engines if engines is None else engines
        left = {e: changed.difference(parts if e in reached else ()) for e, changed in self._changed.items()}
        self._changed = {engine: changed for engine, changed in left.items() if changed and not engine.removed}
        self.pool.set_versions(weight_version, draft_version)
        self.fence_changed()

    def _check_opened(self, step: str) -> None:
        if not self.pool.engines or not self.opened.issuperset(self.pool.engines):
            raise RefusedError(f"{step}: expected an update under way, got none; call start_weight_update")

    def _list_needed(self) -> set[Part]:
        """List what an update must bring so that all engines are the same after it."""
        needed = set[Part]()
        for engine in self.pool.engines:
            if engine.fenced:
                needed |= self._changed.get(engine, {"update"})
        return needed

    def note_changed(self, engines: Sequence[Engine], part: Part) -> None:
        """Note that these engines have not the part that they had: they are fenced off until one reaches all."""
        for engine in engines:
            self._changed.setdefault(engine, set()).add(part)

    async def _step(self, path: str, body: Mapping[str, object] | None = None) -> None:
        self.note_changed(self.pool.engines, self._part)
        await self._guarded(lambda: self.call(path, self.pool.engines, body))

    async def _guarded(self, step: Callable[[], Awaitable[Any]]) -> None:
        try:
            await step()
        except StepError:
            self.fence_changed()
            raise

    async def verify(self, engines: Sequence[Engine], version: str) -> None:
        """Check that these engines say this version. Raises StepError."""
        answers = await self.call(VERSION_PATH, engines, method="GET")
        found = {engine: answer.get("weight_version") for engine, answer in answers.items()}
        if wrong := {e: f"expected version {version}, got {v}" for e, v in found.items() if v != version}:
            raise StepError(VERSION_PATH, wrong)

    async def compare(self, engines: Sequence[Engine]) -> dict[Engine, Sequence[digests.Digests]]:
        """Check that engines serve with the same weights; their digests.

        Raises StepError: some have others, or do not know.
        """
        answers = await self.call(digests.PATH, engines, digests.BODY)
        found, wrong = digests.read(answers)
        if wrong := wrong or digests.find_differing(found, lambda engine: engine.name):
            raise StepError("digests", wrong)
        return found

    async def _ask(
        self,
        method: str,
        engine: Engine,
        path: str,
        body: Mapping[str, object] | None,
        params: Params | None,
    ) -> Any:
        """Return the answer, or the OSError that stands for it."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        url, options = engine.config.url + path, engine.config.request_options()
        options |= {"json": body, "params": params, "timeout": timeout}
        try:
            async with self._session.request(method, url, **options) as response:
                if response.status != 200:
                    return OSError(f"HTTP {response.status}: {find_message(await response.text(errors='replace'))}")
                return await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return OSError(f"{type(error).__name__}: {error}")

    def fence_changed(self) -> None:
        """Fence off the engines whose weights are not known."""
        for engine in self._changed:
            engine.fence("an update of its weights failed half-way")
