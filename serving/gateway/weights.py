"""New weights for all engines of a model, or for none.

The steps are vLLM's own endpoints under their own names (vllm/entrypoints/rl/online/api_router.py, checked against
0.32; the engines need VLLM_SERVER_DEV_MODE=1). While they run, requests wait in the gateway's queue. What holds after
any failure: the model is served by engines that have the version it had before, and that were not touched or were
brought back to it and checked; the others are fenced off, until an update succeeds on all. That may leave none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict, StringConstraints

from laguna_serve.serving.gateway.pool import VERSION, Engine, Pool

TIMEOUT_S = 600.0
Version = Annotated[str, StringConstraints(pattern=VERSION)]
PauseMode = Literal["keep", "wait", "abort"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Update(_Body):
    """What one version is made of: the bodies of `/update_weights`, in order, for the model and for its drafter."""

    weight_version: Version | None = None
    update: Sequence[dict[str, Any]] = ()
    draft_version: Version | None = None
    draft_update: Sequence[dict[str, Any]] = ()


class UpdateRequest(Update):
    """An update, and how to take it back where it fails half-way."""

    mode: PauseMode = "keep"
    rollback: Update | None = None


# Keys and values of the old weights must not be attended to with the new ones: requests that are held in the middle
# are computed again up to where they were.
RESET = "/reset_prefix_cache"
RESET_ALL = {"reset_running_requests": "true"}


class StepError(Exception):
    """A step failed on some engines; `errors` by engine."""

    def __init__(self, step: str, errors: Mapping[Engine, str]) -> None:
        told = "; ".join(f"{engine.name}: {error}" for engine, error in errors.items())
        super().__init__(f"{step}: {told}")
        self.errors = errors


class WeightGroup:
    """The engines of a model, as far as their weights go. One update at a time. `session` keeps no connection."""

    def __init__(self, pool: Pool, session: aiohttp.ClientSession) -> None:
        self.pool, self._session = pool, session
        self._touched: set[Engine] = set()
        self.lock = asyncio.Lock()

    async def pause(self, mode: PauseMode) -> None:
        """Hold new requests in the queue, and pause every engine. Raises StepError: nothing is paused then."""
        self.pool.pause()
        try:
            await self.call("/pause", self.pool.engines, params={"mode": mode})
        except StepError as error:
            await self.resume([engine for engine in self.pool.engines if engine not in error.errors])
            raise

    async def resume(self, engines: Sequence[Engine] | None = None) -> None:
        """Every engine goes on, or those given. One that cannot is fenced off, and one in the middle of an update."""
        self._fence_touched()
        try:
            await self.call("/resume", self.pool.engines if engines is None else engines)
        except StepError as error:
            for engine, reason in error.errors.items():
                engine.fence(f"/resume: {reason}")
        finally:
            self.pool.resume()

    async def start(self, *, draft: bool) -> None:
        """Begin an update on every engine. Raises StepError: those that were touched are fenced off."""
        await self._step("/start_draft_weight_update" if draft else "/start_weight_update")

    async def update(self, info: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """One body of `/update_weights` to every engine. Raises StepError as `start`."""
        await self._step("/update_weights", {"update_info": info})

    async def finish(self, weight_version: str | None) -> None:
        """End it, and check that every engine says the same version. Raises StepError as `start`."""
        await self._step("/finish_weight_update", {"weight_version": weight_version})
        await self._guarded(lambda: self.call(RESET, self.pool.engines, params=RESET_ALL))
        if weight_version is not None:
            await self._guarded(lambda: self._verify(self.pool.engines, weight_version))

    def settle(self, weight_version: str | None, draft_version: str | None) -> None:
        """All engines have the new version, and say so from now on."""
        self._touched.clear()
        self.pool.set_versions(weight_version, draft_version)

    async def apply(self, request: UpdateRequest) -> dict[str, Any]:
        """The whole of it: pause, update, verify, resume. Returns what became of it, JSON-ready."""
        if not request.update and any(engine.fenced for engine in self.pool.engines):
            return self._report(
                "unchanged", "update: expected the weights, as engines are fenced off, got a version alone"
            )
        try:
            await self.pause(request.mode)
        except StepError as error:
            return self._report("unchanged", str(error))
        try:
            await self._load(request, self.pool.engines)
            self.settle(request.weight_version, request.draft_version)
            return self._report("updated", None)
        except StepError as error:
            if request.rollback is not None:
                await self._roll_back(request.rollback)
            self._fence_touched()
            return self._report(self._find_outcome(), str(error))
        finally:
            await self.resume()

    async def call(
        self,
        path: str,
        engines: Sequence[Engine],
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> dict[Engine, Any]:
        """The same request to several engines at once; their answers. Raises StepError when one has none."""
        found = await asyncio.gather(*(self._ask(method, engine, path, body, params) for engine in engines))
        answers = dict(zip(engines, found, strict=True))
        if errors := {engine: str(a) for engine, a in answers.items() if isinstance(a, OSError)}:
            raise StepError(path, errors)
        return answers

    async def _load(self, update: Update, engines: Sequence[Engine]) -> None:
        for bodies, version, start in (
            (update.update, update.weight_version, "/start_weight_update"),
            (update.draft_update, None, "/start_draft_weight_update"),
        ):
            if not bodies:
                continue
            self._touched |= set(engines)
            await self.call(start, engines)
            for body in bodies:
                await self.call("/update_weights", engines, {"update_info": body})
            await self.call("/finish_weight_update", engines, {"weight_version": version})
            await self.call(RESET, engines, params=RESET_ALL)
        if update.weight_version is not None:
            if not update.update:
                self._touched |= set(engines)
                await self.call("/update_weight_version", engines, {"new_version": update.weight_version})
            await self._verify(engines, update.weight_version)

    async def _roll_back(self, update: Update) -> None:
        """Every touched engine on its own: one that cannot be brought back is no reason to give up another."""
        weights, draft = self.pool.versions
        whole = update.model_copy(update={"weight_version": weights.decode(), "draft_version": draft.decode()})
        for engine in list(self._touched):
            try:
                await self._load(whole, [engine])
            except StepError:
                continue
            self._touched.discard(engine)

    async def _step(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        self._touched |= set(self.pool.engines)
        await self._guarded(lambda: self.call(path, self.pool.engines, body))

    async def _guarded(self, step: Callable[[], Awaitable[Any]]) -> None:
        try:
            await step()
        except StepError:
            self._fence_touched()
            raise

    async def _verify(self, engines: Sequence[Engine], version: str) -> None:
        answers = await self.call("/weight_info", engines, method="GET")
        found = {engine: answer.get("weight_version") for engine, answer in answers.items()}
        if wrong := {e: f"expected version {version}, got {v}" for e, v in found.items() if v != version}:
            raise StepError("/weight_info", wrong)

    async def _ask(
        self, method: str, engine: Engine, path: str, body: Mapping[str, Any] | None, params: Mapping[str, str] | None
    ) -> Any:
        """The answer, or the OSError that stands for it."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        url = engine.config.url + path
        try:
            async with self._session.request(method, url, json=body, params=params, timeout=timeout) as response:
                if response.status != 200:
                    return OSError(f"HTTP {response.status}: {(await response.text())[:200]}")
                return await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return OSError(f"{type(error).__name__}: {error}")

    def _fence_touched(self) -> None:
        for engine in self._touched:
            engine.fence("an update of its weights failed half-way")
        self._touched.clear()

    def _find_outcome(self) -> str:
        """Of an update that failed."""
        fenced = [engine.fenced is not None for engine in self.pool.engines]
        return "unavailable" if all(fenced) else "reduced" if any(fenced) else "rolled_back"

    def _report(self, outcome: str, error: str | None) -> dict[str, Any]:
        engines = {
            engine.name: {
                "weight_version": engine.versions[0].decode(),
                "draft_version": engine.versions[1].decode(),
                "fenced": engine.fenced,
            }
            for engine in self.pool.engines
        }
        return {"outcome": outcome, "model": self.pool.model.name, "error": error, "upstreams": engines}
