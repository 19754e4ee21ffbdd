"""A fake OpenAI-compatible server in a thread: answers by a function, real HTTP, faults to order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from aiohttp import web

# The text of an answer to a request's body; an int is an HTTP status to fail with.
Reply = Callable[[Mapping[str, Any]], str | int]


class FakeOpenAI:
    """Context manager; `url` is its address, `seen` the bodies and `keys` the Authorization headers that came."""

    def __init__(self, reply: Reply, headers: Mapping[str, str] | None = None) -> None:
        self.reply, self.headers = reply, headers or {}
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._answer),
                web.post("/v1/completions", self._answer),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

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
