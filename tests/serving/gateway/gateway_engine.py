"""A mock of an engine with vLLM's routes for weights, on the raw upstream that can also fail byte by byte."""

from __future__ import annotations

import hashlib
import json

from gateway_fakes import Exchange, Upstream
from mock_engine.weights import FINISH, ROUTES, VERSION, Weights

__all__ = ["FINISH", "PATH", "VERSION", "RlEngine"]
PATH = "/v1/completions"


class RlEngine(Upstream, Weights):
    """An engine whose weights can be updated. It says that it has the version that it `claims`, if any.

    An update that it `spoils` is not what it serves with.
    """

    def __init__(self, *, lax: bool = False) -> None:
        Upstream.__init__(self)
        Weights.__init__(self, lax=lax)
        self.claims: str | None = None
        self.spoils: object = None
        self.handlers = dict.fromkeys(ROUTES, self.step)
        self.handlers[VERSION] = self.tell
        self.handlers[PATH] = self.complete
        self.handlers["/collective_rpc"] = self.digest
        self.handlers["/is_paused"] = self.tell_pause

    async def step(self, exchange: Exchange) -> None:
        body = json.loads(exchange.body) if exchange.body else {}
        if self.take(exchange.line.split(" ")[1], body):
            await exchange.answer(b'{"message": "ok"}')
        else:
            await exchange.answer(b"no", status="500 No")

    async def tell(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"weight_version": self.claims or self.version}).encode())

    async def tell_pause(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"is_paused": self.paused}).encode())

    async def digest(self, exchange: Exchange) -> None:
        asked = json.loads(exchange.body)["method"]
        if asked == "can_digest_weights":
            await exchange.answer(b'{"results": [{"can": true}]}')
            return
        assert asked == "digest_weights"
        last = self.loaded[-1:]
        found = hashlib.sha256(f"{last}{last == [self.spoils]}".encode()).hexdigest()
        await exchange.answer(json.dumps({"results": [{"model": found, "draft": "d"}]}).encode())

    async def refuse(self, exchange: Exchange) -> None:
        await exchange.answer(b'{"detail": "Not Found"}', status="404 Not Found")

    async def complete(self, exchange: Exchange) -> None:
        await exchange.answer(b"{}")
