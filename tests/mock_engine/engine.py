"""The mock engine: vLLM's routes over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from mock_engine import models
from mock_engine.counters import Counters
from mock_engine.models import Answer, Body, Said, read_prompt
from mock_engine.server import MockServer
from mock_engine.settings import Settings
from mock_engine.weights import ROUTES, VERSION

BEGIN = 1
# Of requests that wait for others.
PATIENCE_S = 5.0
CUTS = ("error_event", "truncate", "no_done")


def answering(reply: Callable[[Body], str | int], headers: Mapping[str, str] | None = None) -> MockEngine:
    """A mock that answers every request's body with a text, or fails with a status; it requires nothing of them."""
    return MockEngine(Settings(says=lambda _, body: reply(body), headers=headers or {}, requires=()))


def scoring(**changes: Any) -> Settings:
    """Settings of a mock that scores prompts of token ids, each at its id ÷ 100 nats.

    A character is a token, and 1 begins. Once it dies it answers 503.
    """
    usual = {"models": ("fake", "other"), "listed_length": True, "vocabulary": 1000, "dies_with": 503, "requires": ()}
    return Settings(**(usual | {"loss": lambda token: token / 100} | changes))


class MockEngine(MockServer):
    """An engine without a model, as a context manager; `url` is its address.

    `bodies` are the requests for answers in the order in which they came, `keys` their Authorization headers, `most`
    how many were in flight together.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.counters = Counters(self.settings.gamma)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = self._in_flight = 0
        self._rendered: dict[tuple[int, ...], str] = {}
        self._met = asyncio.Event()

    @property
    def seen(self) -> list[Any]:
        """The prompts of `bodies`."""
        return [read_prompt(body) for body in self.bodies]

    def routes(self) -> list[web.RouteDef]:
        """Counters and weights only where the settings have them."""
        found = [
            web.get("/health", self._health),
            web.get("/v1/models", self._models),
            web.post("/tokenize", self._tokenize),
            web.post("/v1/completions", self.take),
            web.post("/v1/chat/completions", self.take),
        ]
        if self.settings.counted:
            found.append(web.get("/metrics", self._metrics))
        if self.settings.weights is not None:
            found += [web.get(VERSION, self._version), *(web.post(path, self._step) for path in ROUTES)]
        return found

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": name, "object": "model"} for name in self.settings.models]
        if self.settings.listed_length:
            cards[0] |= {"root": self.settings.root, "max_model_len": self.settings.max_model_len}  # type: ignore[dict-item]
        return self._refuse(request) or web.json_response({"object": "list", "data": cards})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.counters.render())

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        is_chat = "messages" in body
        if is_chat:
            body = {"prompt": models.render_chat(body), "add_special_tokens": True}
        tokens = [BEGIN] * body["add_special_tokens"] + [ord(character) for character in body["prompt"]]
        if is_chat:
            self._rendered[tuple(tokens)] = body["prompt"]
        answer = {"count": len(tokens), "max_model_len": self.settings.max_model_len, "tokens": tokens}
        return self._refuse(request) or web.json_response(answer)

    async def _version(self, _: web.Request) -> web.Response:
        assert self.settings.weights is not None
        return web.json_response({"weight_version": self.settings.weights.version})

    async def _step(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        assert self.settings.weights is not None
        if self.settings.weights.take(request.path_qs, body):
            return web.json_response({"success": True})
        return web.json_response({"error": {"message": "a value is not finite"}}, status=500)

    def _refuse(self, request: web.Request, body: Body | None = None) -> web.Response | None:
        """Refuse a request without the key, or one that leaves to the server what the settings require of it.

        Such a request would be measured under whatever the model's generation_config.json says.
        """
        if self.settings.key is not None and request.headers.get("Authorization") != f"Bearer {self.settings.key}":
            return _fail(401, "no such key")
        left = set(self.settings.requires) - body.keys() if body is not None else ()
        return _fail(400, f"left to the server: {sorted(left)}") if left else None

    async def take(self, request: web.Request) -> web.StreamResponse:
        """A request for an answer."""
        body, settings = await request.json(), self.settings
        if (refused := self._refuse(request, body)) is not None:
            return refused
        is_over = settings.die_after is not None and len(self.bodies) >= settings.die_after
        if is_over and settings.dies_with is not None:
            return _fail(settings.dies_with, "engine is gone")
        if body.get("prompt_logprobs") is not None and (refused := self._check_scored(body)) is not None:
            return refused
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if is_over:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        try:
            await self._meet()
            return await self._answer(request, body)
        finally:
            self._in_flight -= 1

    async def _meet(self) -> None:
        """All but the first wait until as many requests have been in flight as `together` says."""
        if self._in_flight >= self.settings.together:
            self._met.set()
        if len(self.bodies) > 1:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._met.wait(), PATIENCE_S)

    async def _answer(self, request: web.Request, body: Body) -> web.StreamResponse:
        settings, prompt = self.settings, read_prompt(body)
        if isinstance(prompt, list):
            prompt = self._rendered.get(tuple(prompt), prompt)
        fault = settings.faults.get(prompt) if isinstance(prompt, str) else None
        self.counters.count_drafts(settings.drafts_per_answer)
        if fault == "http_500":
            return _fail(500, "out of luck")
        if settings.says is not None:
            return self._render(body, settings.says(self, body))
        if body.get("prompt_logprobs") is not None:
            return web.json_response(self._score(prompt))
        if isinstance(prompt, list):
            return self._render(body, models.say_next(settings, prompt))
        if body.get("n"):
            self.counters.generation += body["n"] * body["max_tokens"]
            return web.json_response(models.sample(settings, body, len(self.bodies)))
        count = body["max_tokens"] - settings.shorten
        if not body.get("ignore_eos", True):
            count = min(count, settings.ends.get(prompt, count))
        if body.get("stream"):
            return await self._stream(request, prompt, models.list_tokens(settings, prompt, count))
        self.counters.hits += settings.prefix_hits
        said = models.say_greedily(settings, prompt, count)
        for number, start in enumerate(range(0, count, settings.chunk_tokens)):
            self._count_chunk(number, len(said.ids[start : start + settings.chunk_tokens]))
        return self._render(body, said)

    def _check_scored(self, body: Body) -> web.Response | None:
        """A prompt whose tokens are to be scored, of which none is sampled."""
        assert (body["max_tokens"], body["prompt_logprobs"], body["model"]) == (1, 0, "fake")
        if isinstance(body["prompt"], str):
            return None
        assert len(body["prompt"]) < self.settings.max_model_len
        if (worst := max(body["prompt"])) >= self.settings.vocabulary:
            return _fail(400, f"Token id {worst} is out of vocabulary")
        return None

    def _score(self, prompt: str | list[int]) -> dict[str, Any]:
        """What every token of a prompt but the first one costs."""
        tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
        steps = [None, *({str(t): {"logprob": -self.settings.find_loss(t), "rank": 1}} for t in tokens[1:])]
        return {"choices": [{"text": "", "token_ids": [0], "prompt_logprobs": self.settings.spoil(steps)}]}

    def _render(self, body: Body, answer: Answer) -> web.Response:
        """An answer in the form of the API that was asked."""
        if isinstance(answer, int):
            return _fail(answer, "no luck")
        if isinstance(answer, str):
            said = {"message": {"role": "assistant", "content": answer}} if "messages" in body else {"text": answer}
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "fake",
                "choices": [{"index": 0, "finish_reason": "stop", **said}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
            }
        elif isinstance(answer, Said):
            answer = self._render_chat(answer) if "messages" in body else self._render_completion(answer, body)
        return web.json_response(answer, headers=self.settings.headers)

    def _render_completion(self, said: Said, body: Body) -> dict[str, Any]:
        ended = len(said.ids) < body.get("max_tokens", 16)
        choice: dict[str, Any] = {"text": said.text, "logprobs": {"top_logprobs": said.top}}
        choice["finish_reason"] = "stop" if ended else "length"
        if self.settings.ids:
            choice |= {"token_ids": said.ids, "prompt_token_ids": said.prompt_ids}
        return {"choices": [choice], "usage": {"completion_tokens": len(said.ids)}}

    def _render_chat(self, said: Said) -> dict[str, Any]:
        content = []
        for token, step in zip(said.ids, said.top, strict=True):
            best = [{"token": name, "logprob": value} for name, value in step.items()]
            content.append({"token": f"token_id:{token}", "logprob": step[f"token_id:{token}"], "top_logprobs": best})
        choice = {"message": {"content": said.text}, "token_ids": said.ids, "logprobs": {"content": content}}
        return {"choices": [choice], "prompt_token_ids": said.prompt_ids}

    async def _stream(self, request: web.Request, prompt: str, tokens: list[int]) -> web.StreamResponse:
        settings, fault = self.settings, self.settings.faults.get(prompt)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._send(response, b": a comment, as proxies send them\n\n")
        prompt_ids = [byte + settings.prompt_shift for byte in prompt.encode()]
        for number, start in enumerate(range(0, len(tokens), settings.chunk_tokens)):
            if number == 2 and fault in CUTS:
                if not await self._cut(response, fault):
                    return response
                break
            chunk = tokens[start : start + settings.chunk_tokens]
            choice: dict[str, Any] = {"text": models.say_text(chunk) + "!" * settings.other_text}
            if settings.ids:
                choice["token_ids"] = chunk
            if number == 0:
                choice["prompt_token_ids"] = prompt_ids
            if start + len(chunk) == len(tokens):
                choice["finish_reason"] = "stop" if len(tokens) == settings.ends.get(prompt) else "length"
            await self._spend()
            await self._write(response, {"choices": [choice]})
            self._count_chunk(number, len(chunk))
        self.counters.count_request(len(prompt_ids), hits=settings.prefix_hits, foreign=settings.foreign_tokens)
        usage = len(tokens) + (fault == "wrong_usage")
        await self._write(response, {"choices": [], "usage": {"completion_tokens": usage}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _cut(self, response: web.StreamResponse, fault: str) -> bool:
        """Break a stream. True where it goes on to its end."""
        if fault == "error_event":
            await self._write(response, {"error": {"message": "engine core died", "code": 500}})
        if fault == "truncate":
            await response.write(b'data: {"choices": [{"te')
        return fault == "error_event"

    async def _spend(self) -> None:
        """The time that a chunk takes, on the controlled clock where there is one."""
        if self.settings.clock is None:
            await asyncio.sleep(self.settings.delay_s)
        else:
            self.settings.clock.advance(self.settings.delay_s)

    async def _write(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        line = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        size = self.settings.split_bytes or len(line)
        for start in range(0, len(line), size):
            await self._send(response, line[start : start + size])
            if self.settings.split_bytes:
                await asyncio.sleep(0)

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        """With a controlled clock, only once what was sent before has been stamped."""
        clock = self.settings.clock
        reading = None if clock is None else clock.expect_reading()
        await response.write(data)
        if clock is not None and reading is not None:
            await clock.wait(reading)

    def _count_chunk(self, number: int, size: int) -> None:
        self.counters.count_chunk(number, size, drafted=self.settings.count_drafts)


def _fail(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)
