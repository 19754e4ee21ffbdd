"""A fake engine for rollouts: groups of completions, new weights by vLLM's routes, and time that is told, not taken."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any, ClassVar

from ab_harness import StandInEngine
from aiohttp import web
from fake_engine import Behaviour, FakeEngine

from laguna_serve.serving.engine import EngineConfig

START = "default"
PLAIN_STEP_S = 0.01


class RolloutEngine(FakeEngine):
    """`tau[version]`: tokens per step; `cost`: of a step, in plain steps. `steps`: the routes that were called."""

    clock_s: ClassVar[float] = 0.0

    def __init__(self, gamma: int, tau: dict[str, int], cost: float, fault: str | None, die_after: int | None) -> None:
        super().__init__(Behaviour(gamma=gamma, die_after=die_after))
        self.tau, self.cost, self.fault = tau, cost, fault
        self.version, self.folder = START, ""
        self.steps: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def routes(self) -> list[web.RouteDef]:
        weights = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume")
        changing = [web.post(path, self._change) for path in (*weights, "/reset_prefix_cache")]
        return [*super().routes(), *changing, web.get("/weight_info", self._tell)]

    async def _change(self, request: web.Request) -> web.Response:
        if request.path != "/reset_prefix_cache":
            self.steps.append(request.path_qs)
        if request.path == self.fault:
            return web.json_response({"error": {"message": "a value is not finite"}}, status=500)
        body = await request.json() if request.can_read_body else {}
        if request.path == "/update_weights":
            self.folder = body["update_info"]["folder"]
        if request.path == "/finish_weight_update" and self.fault != "deaf":
            self.version = body["weight_version"]
        return web.json_response({"success": True})

    async def _tell(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        self.seen.append(body["prompt"])
        self.bodies.append(body)
        if self.behaviour.die_after is not None and len(self.seen) > self.behaviour.die_after:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        count, step = body["max_tokens"], self.tau[self.version] if self.behaviour.gamma else 1
        for _ in range(body["n"]):
            for number, start in enumerate(range(0, count, step)):
                self._count_chunk(number, min(step, count - start))
        if self.fault == "foreign":
            self.counters["generation"] += 1
        uneven = 0.9 + zlib.crc32(f"{body['prompt']}{bool(self.behaviour.gamma)}".encode()) % 21 / 100
        type(self).clock_s += uneven * self.cost * PLAIN_STEP_S * count / step
        choices = [{"token_ids": list(range(count)), "logprobs": {"token_logprobs": [-1.0] * count}}] * body["n"]
        return web.json_response({"choices": choices})


class RolloutStandIn(StandInEngine):
    """Takes the launcher's place. `tau`, `cost`, `fault` and `die_after` are those of the speculating engine."""

    tau: ClassVar[dict[str, int]] = {START: 4}
    cost: ClassVar[float] = 2.0
    fault: ClassVar[str | None] = None
    die_after: ClassVar[int | None] = None
    engines: ClassVar[tuple[RolloutEngine, ...]] = ()

    def __init__(self, config: EngineConfig, **more: Any) -> None:
        super().__init__(config, **more)
        made, drafting = type(self), config.draft is not None
        fault, die_after = (made.fault, made.die_after) if drafting else (None, None)
        engine = RolloutEngine(7 if drafting else 0, made.tau, made.cost if drafting else 1.0, fault, die_after)
        self._fake = engine
        made.engines += (engine,)


def tell_time() -> SimpleNamespace:
    """In the place of the module `time`: the engines' own clock."""
    return SimpleNamespace(perf_counter=lambda: RolloutEngine.clock_s)
