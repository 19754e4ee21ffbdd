"""A mock of an engine with vLLM's routes for weights."""

from __future__ import annotations

import json
from typing import Any

from gateway_fakes import Exchange, Upstream

PATH = "/v1/completions"
STARTS = ("/start_weight_update", "/start_draft_weight_update")
STEPS = ("/pause", "/resume", *STARTS, "/update_weights")
FINISH, VERSION = "/finish_weight_update", "/weight_info"
RESET = "/reset_prefix_cache"


class RlEngine(Upstream):
    """An engine with vLLM's routes for weights. As in vLLM one update goes on at a time: it must be started, and ends
    when it is finished or a part of it fails.

    A `lax` one takes every step at any time. `fail` names the routes that answer 500, `fail_once` those that do the
    first time; `loaded` is what it was sent.
    """

    def __init__(self, *, lax: bool = False) -> None:
        super().__init__()
        self.lax = lax
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.fail_once: set[str] = set()
        self.version = "default"
        self.loaded: list[Any] = []
        self.claims: str | None = None
        self.started = False
        self.handlers = dict.fromkeys((*STEPS, FINISH, RESET, "/update_weight_version"), self.step)
        self.handlers[VERSION] = self.tell
        self.handlers[PATH] = self.complete

    async def step(self, exchange: Exchange) -> None:
        path = exchange.line.split(" ")[1]
        route = path.partition("?")[0]
        self.calls.append(path)
        body = json.loads(exchange.body) if exchange.body else {}
        fails = route in self.fail | self.fail_once
        self.fail_once.discard(route)
        if fails or not (self.lax or self.is_in_order(route, body)):
            if route == "/update_weights":
                self.started = False
            await exchange.answer(b"no", status="500 No")
            return
        if route in STARTS:
            self.started = True
        elif route == "/update_weights":
            self.loaded.append(body["update_info"])
        elif route == FINISH:
            self.started = False
        self.version = body.get("weight_version") or body.get("new_version") or self.version
        await exchange.answer(b'{"message": "ok"}')

    def is_in_order(self, route: str, body: dict[str, Any]) -> bool:
        if route in STARTS:
            return not self.started
        return (self.started or route not in ("/update_weights", FINISH)) and body.get("update_info") != {}

    async def tell(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"weight_version": self.claims or self.version}).encode())

    async def refuse(self, exchange: Exchange) -> None:
        await exchange.answer(b'{"detail": "Not Found"}', status="404 Not Found")

    async def complete(self, exchange: Exchange) -> None:
        await exchange.answer(b"{}")

    @property
    def paused(self) -> bool:
        steps = [call.partition("?")[0] for call in self.calls if call.startswith(("/pause", "/resume"))]
        return steps[-1:] == ["/pause"]
