"""A fake OpenAI-compatible server in a thread: answers by a function, real HTTP, faults to order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from fake_server import FakeServer

# The text of an answer to a request's body; an int is an HTTP status to fail with.
Reply = Callable[[Mapping[str, Any]], str | int]


class FakeOpenAI(FakeServer):
    """Context manager; `url` is its address, `seen` the bodies and `keys` the Authorization headers that came."""

    def __init__(self, reply: Reply, headers: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.reply, self.headers = reply, headers or {}
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [
            web.get("/v1/models", self._models),
            web.post("/v1/chat/completions", self._answer),
            web.post("/v1/completions", self._answer),
        ]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(body)
        self.keys.append(request.headers.get("Authorization"))
        text = self.reply(body)
        if isinstance(text, int):
            return web.json_response({"error": {"message": "no luck"}}, status=text)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        answer = {
            "id": "1",
            "object": "x",
            "created": 1,
            "model": "fake",
            "choices": [{"index": 0, "finish_reason": "stop", **said}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
        }
        return web.json_response(answer, headers=self.headers)
