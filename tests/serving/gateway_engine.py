"""A stand-in for an engine with vLLM's routes for weights."""

from __future__ import annotations

import json
from typing import Any

from gateway_fakes import Exchange, Upstream

PATH = "/v1/completions"
STEPS = ("/pause", "/resume", "/start_weight_update", "/start_draft_weight_update", "/update_weights")
FINISH, VERSION = "/finish_weight_update", "/weight_info"
RESET = "/reset_prefix_cache"


class RlEngine(Upstream):
    """An engine with vLLM's routes for weights. `fail` names those that answer 500; `loaded` is what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.version = "default"
        self.loaded: list[Any] = []
        self.claims: str | None = None
        self.handlers = dict.fromkeys((*STEPS, FINISH, RESET, "/update_weight_version"), self.step)
        self.handlers[VERSION] = self.tell
        self.handlers[PATH] = self.complete

    async def step(self, exchange: Exchange) -> None:
        path = exchange.line.split(" ")[1]
        route = path.partition("?")[0]
        self.calls.append(path)
        if route in self.fail:
            await exchange.answer(b"no", status="500 No")
            return
        body = json.loads(exchange.body) if exchange.body else {}
        if route == "/update_weights":
            self.loaded.append(body["update_info"])
        self.version = body.get("weight_version") or body.get("new_version") or self.version
        await exchange.answer(b'{"message": "ok"}')

    async def tell(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"weight_version": self.claims or self.version}).encode())

    async def complete(self, exchange: Exchange) -> None:
        await exchange.answer(b"{}")

    @property
    def paused(self) -> bool:
        steps = [call.partition("?")[0] for call in self.calls if call.startswith(("/pause", "/resume"))]
        return steps[-1:] == ["/pause"]
