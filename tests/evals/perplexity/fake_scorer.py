"""A fake vLLM in a thread that scores prompts: a token is a character, 1 begins, and each costs its id ÷ 100 nats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fake_server import FakeServer

BEGIN = 1


def keep(steps: list[Any]) -> Any:
    """The answer as it is."""
    return steps


@dataclass
class Behaviour:
    """What the endpoint does. `die_after` requests it answers 503; `losses` replaces the loss of a token."""

    vocabulary: int = 1000
    max_model_len: int = 64
    listed_length: bool = True
    die_after: int | None = None
    key: str | None = None
    losses: dict[int, float] = field(default_factory=dict)
    spoil: Callable[[list[Any]], Any] = keep

    def loss(self, token: int) -> float:
        return self.losses.get(token, token / 100)


class FakeScorer(FakeServer):
    """Context manager; `url` is its address, `seen` the prompts in the order in which they came, `most` how many were
    in flight together. `spoil` of its behaviour spoils answers."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        super().__init__()
        self.behaviour = behaviour or Behaviour()
        self.seen: list[list[int]] = []
        self.most = self._now = 0

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [
            web.get("/v1/models", self._models),
            web.post("/tokenize", self._tokenize),
            web.post("/v1/completions", self._complete),
        ]

    def _refuse(self, request: web.Request) -> web.Response | None:
        key = self.behaviour.key
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        return None

    async def _models(self, request: web.Request) -> web.Response:
        item: dict[str, Any] = {"id": "fake"}
        if self.behaviour.listed_length:
            item |= {"root": "somewhere/fake", "max_model_len": self.behaviour.max_model_len}
        return self._refuse(request) or web.json_response({"data": [item, {"id": "other"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = [BEGIN] * body["add_special_tokens"] + [ord(character) for character in body["prompt"]]
        answer = {"count": len(tokens), "max_model_len": self.behaviour.max_model_len, "tokens": tokens}
        return self._refuse(request) or web.json_response(answer)

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens: list[int] = body["prompt"]
        assert (body["max_tokens"], body["prompt_logprobs"], body["model"]) == (1, 0, "fake")
        assert len(tokens) < self.behaviour.max_model_len
        if (refused := self._refuse(request)) is not None:
            return refused
        if max(tokens) >= self.behaviour.vocabulary:
            message = f"Token id {max(tokens)} is out of vocabulary"
            return web.json_response({"error": {"message": message}}, status=400)
        if self.behaviour.die_after is not None and len(self.seen) >= self.behaviour.die_after:
            return web.json_response({"error": {"message": "engine is gone"}}, status=503)
        self.seen.append(tokens)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.002)
        self._now -= 1
        steps: list[Any] = [None, *({str(t): {"logprob": -self.behaviour.loss(t), "rank": 1}} for t in tokens[1:])]
        return web.json_response({"choices": [{"text": "", "prompt_logprobs": self.behaviour.spoil(steps)}]})
