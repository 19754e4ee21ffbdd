"""The names that models go by: those of the configuration, and what engines list under /v1/models.

Those of engines (LoRA adapters, further served names) are asked when a name is looked up that is not known. What an
engine listed holds until it answers otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import aiohttp
import msgspec

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.kit.results import JsonObject

MODELS = "/v1/models"
TIMEOUT_S = 2.0
MAX_LIST_BYTES = 1 << 20
MAX_NAMES = 1000
# So often engines are asked at most, whatever is looked up; so long their word is good for a name that they listed.
ASK_EVERY_S = 1.0
GOOD_FOR_S = 30.0
Card = JsonObject


class Catalog:
    """Of all the models of a gateway."""

    def __init__(self, session: aiohttp.ClientSession, clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._clock = session, clock
        self._pools: Mapping[str, Pool] = {}
        self._configured: dict[str, Pool] = {}
        self._said: dict[Engine, dict[str, Card]] = {}  # what each engine listed when it last answered
        self._listed: dict[str, dict[str, Card]] = {}
        self._nameless: set[str] = set()
        self._silent: set[str] = set()  # models of which an engine did not answer
        self._asked_s = -GOOD_FOR_S
        self._asking: asyncio.Task[None] | None = None
        self._created = int(time.time())

    def configure(self, pools: Mapping[str, Pool]) -> None:
        """Take the models; what their engines list is asked anew."""
        self._pools = pools
        self._configured = {name: pool for pool in pools.values() for name in (pool.model.name, *pool.model.aliases)}
        self._listed, self._asked_s = {}, self._clock() - GOOD_FOR_S

    async def stop(self) -> None:
        """End what is being asked; nothing is asked afterwards."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def find(self, name: str) -> Pool | None:
        """Find the model of a name that is configured, or was listed not long ago."""
        if (pool := self._configured.get(name)) is not None:
            return pool
        if self._clock() - self._asked_s > GOOD_FOR_S:
            return None
        return next((self._pools[model] for model, cards in self._listed.items() if name in cards), None)

    def is_nameless(self, pool: Pool) -> bool:
        """Whether all of its engines have answered, when they were last asked, and none listed a model."""
        return pool.model.name in self._nameless

    async def search(self, name: str) -> Pool | None:
        """Search for the model of a name; engines are asked for one that is not known."""
        for _ in range(2):  # again where a reload has come meanwhile, else nobody is asked twice
            if (pool := self.find(name)) is not None:
                return pool
            await self._ask_engines()
        return self.find(name)

    def explain_unknown(self, name: str) -> GatewayError:
        """Say that nobody knows a name, or that an engine which may know it has not answered."""
        if not self._silent:
            return errors.unknown_model(name)
        message = "An engine has not answered which models it has, this one perhaps. Please try again later."
        code = "service_unavailable"
        return GatewayError(503, "server_error", message, errors.RETRY_AFTER_S, code=code, reason="no_names")

    async def render_list(self, is_shown: Callable[[Pool, str], bool]) -> bytes:
        """All names that are shown, as OpenAI's API lists them: what engines tell of each, else what is known here."""
        await self._ask_engines()
        found: dict[str, Card] = {}
        for model, pool in self._pools.items():
            listed = self._listed.get(model, {})
            for name in (pool.model.name, *pool.model.aliases):
                if is_shown(pool, name):
                    found[name] = listed.get(name) or self._describe(name)
            for name, card in listed.items():
                if is_shown(pool, name):
                    found.setdefault(name, card)
        return msgspec.json.encode({"object": "list", "data": list(found.values())})

    async def render_model(self, name: str) -> bytes | None:
        """One of them, None for a name that nobody knows."""
        await self._ask_engines()
        if (pool := await self.search(name)) is None:
            return None
        return msgspec.json.encode(self._listed.get(pool.model.name, {}).get(name) or self._describe(name))

    def _describe(self, name: str) -> Card:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "laguna"}

    async def _ask_engines(self) -> None:
        """Those that are up, all at once and once for all who wait; not more often than every ASK_EVERY_S."""
        if self._asking is None and self._clock() - self._asked_s >= ASK_EVERY_S:
            self._asking = asyncio.create_task(self._ask_all())
        if self._asking is not None:
            await asyncio.shield(self._asking)  # who leaves does not take it from the others

    async def _ask_all(self) -> None:
        try:
            pools = self._pools
            asked = [(name, engine) for name, pool in pools.items() for engine in pool.engines if engine.up]
            lists = await asyncio.gather(*(self._ask(engine) for _, engine in asked))
            if pools is not self._pools:  # a reload has come
                return
            said = {engine: cards for (_, engine), cards in zip(asked, lists, strict=True) if cards is not None}
            former, self._said, self._listed = self._said, {}, {}
            for name, pool in pools.items():
                for engine in pool.engines:
                    self._said[engine] = said.get(engine, former.get(engine, {}))
                    self._listed.setdefault(name, {}).update(self._said[engine])
            self._silent = {name for name, engine in asked if engine not in said}
            self._nameless = {name for name, _ in asked if not self._listed.get(name)} - self._silent
            self._asked_s = self._clock()
        finally:
            self._asking = None

    async def _ask(self, engine: Engine) -> dict[str, Card] | None:
        """Ask what an engine lists; None if it does not answer."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with self._session.get(
                engine.config.url + MODELS, timeout=timeout, **engine.config.request_options()
            ) as response:
                body = bytearray()
                async for data in response.content.iter_any():
                    body += data
                    if len(body) > MAX_LIST_BYTES:
                        return {}
                if response.status != 200:
                    return None if response.status >= 500 else {}
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        try:
            cards = msgspec.json.decode(body)["data"]
            return {card["id"]: card for card in cards[:MAX_NAMES] if isinstance(card["id"], str)}
        except (ValueError, LookupError, TypeError, RecursionError):
            return {}
