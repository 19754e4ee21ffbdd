"""A fake vLLM server in a thread: deterministic tokens, real HTTP, counters, and faults to order."""

from __future__ import annotations

import asyncio
import json
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fake_server import FakeServer

from laguna_serve.serving.client.sampling import PLAIN_SAMPLING

VOCABULARY = 1000


@dataclass
class Behaviour:
    """What the engine does.  `faults` maps a prompt to one of http_500, error_event, truncate, no_done, wrong_usage."""

    chunk_tokens: int = 1
    delay_s: float = 0.0002
    gamma: int = 0
    split_bytes: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    flips: dict[str, int] = field(default_factory=dict)
    flips_again: dict[str, int] = field(default_factory=dict)
    margin: float = 0.01
    noise: float = 0.0
    hide_second: bool = False
    other_text: bool = False
    foreign_tokens: int = 0
    prefix_hits: int = 0
    prompt_shift: int = 0
    shorten: int = 0
    count_drafts: bool = True
    die_after: int | None = None
    ids: bool = True
    sharpen: float = 0.0
    loss: float = 2.5
    next_top: dict[int, float] = field(default_factory=lambda: {0: -0.1})


class FakeEngine(FakeServer):
    """Context manager; `url` is its address, `seen` the prompts in the order in which they came.

    A request that leaves a sampling parameter to the server is refused: it would be measured under whatever the model's
    generation_config.json says.
    """

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        super().__init__()
        self.behaviour = behaviour or Behaviour()
        self.seen: list[str | list[int]] = []
        self.counters = dict.fromkeys(
            ("drafts", "draft_tokens", "accepted", "generation", "prompt", "hits", "requests"), 0
        )
        self.accepted_per_position = [0] * self.behaviour.gamma
        self._random = random.Random(id(self))

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
            web.get("/v1/models", self._models),
            web.post("/v1/completions", self._complete),
        ]

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        labels = '{engine="0",model_name="fake"}'
        count = self.counters
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            f"vllm:generation_tokens_total{labels} {float(count['generation'])}",
            f"vllm:generation_tokens_created{labels} 1.7e+09",
            f"vllm:prompt_tokens_total{labels} {float(count['prompt'])}",
            f"vllm:prefix_cache_hits_total{labels} {float(count['hits'])}",
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {float(count["requests"])}',
            'vllm:request_success_total{engine="0",finished_reason="stop"} 0.0',
        ]
        if self.behaviour.gamma:
            for name, key in (("drafts", "drafts"), ("draft_tokens", "draft_tokens"), ("accepted_tokens", "accepted")):
                lines.append(f"vllm:spec_decode_num_{name}_total{labels} {float(count[key])}")
            for position, accepted in enumerate(self.accepted_per_position):
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                lines.append(f'{name}{{engine="0",position="{position}"}} {float(accepted)}')
        return web.Response(text="\n".join(lines) + "\n")

    def tokens_of(self, prompt: str, count: int, again: bool = False) -> list[int]:
        """The greedy continuation; from a flip on, every id is one higher."""
        seed = zlib.crc32(prompt.encode())
        tokens = [(seed // 7 + index * index * 31 + index) % (VOCABULARY - 2) for index in range(count)]
        flips = self.behaviour.flips_again if again and self.behaviour.flips_again else self.behaviour.flips
        flip = flips.get(prompt, count)
        return [token + (index >= flip) for index, token in enumerate(tokens)]

    async def _read(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        left = {"temperature", *PLAIN_SAMPLING} - body.keys()
        if left:
            raise web.HTTPBadRequest(text=f"left to the server: {sorted(left)}")
        return body

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        behaviour, prompt = self.behaviour, body["prompt"]
        self.seen.append(prompt)
        if behaviour.die_after is not None and len(self.seen) > behaviour.die_after:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(prompt, list):
            return web.json_response(self._answer_ids())
        if body.get("prompt_logprobs") is not None:
            steps = [None, *({str(byte): {"logprob": -behaviour.loss}} for byte in prompt.encode()[1:])]
            return web.json_response({"choices": [{"text": "", "token_ids": [0], "prompt_logprobs": steps}]})
        if body.get("n"):
            return web.json_response({"choices": [self._draw(body["max_tokens"]) for _ in range(body["n"])]})
        if behaviour.faults.get(prompt) == "http_500":
            return web.json_response({"error": {"message": "out of luck"}}, status=500)
        tokens = self.tokens_of(prompt, body["max_tokens"] - behaviour.shorten, again=not body.get("stream"))
        if not body.get("stream"):
            return web.json_response(self._answer_whole(prompt, tokens))
        return await self._answer_stream(request, prompt, tokens)

    def _answer_whole(self, prompt: str, tokens: list[int]) -> dict[str, Any]:
        behaviour = self.behaviour
        for number, start in enumerate(range(0, len(tokens), behaviour.chunk_tokens)):
            self._count_chunk(number, len(tokens[start : start + behaviour.chunk_tokens]))
        flip = min(behaviour.flips.get(prompt, len(tokens)), len(tokens))
        top = []
        for index, token in enumerate(tokens):
            other = token - 1 if behaviour.flips.get(prompt) == index else token + 1
            second = {f"token_id:{other}": -0.7 - behaviour.margin}
            if behaviour.hide_second and index == flip:
                second = {f"token_id:{token + 7}": -0.7 - behaviour.margin}
            top.append({f"token_id:{token}": -0.7 + (behaviour.noise if index < flip else 0.0), **second})
        text = "".join(f" é{token}" for token in tokens)
        ids = [byte + behaviour.prompt_shift for byte in prompt.encode()]
        choice = {"text": text, "token_ids": tokens, "prompt_token_ids": ids, "logprobs": {"top_logprobs": top}}
        return {"choices": [choice], "usage": {"completion_tokens": len(tokens)}}

    def _draw(self, count: int) -> dict[str, Any]:
        """A sampled completion over three tokens; a share of `sharpen` are the likeliest one instead."""
        if self._random.random() < self.behaviour.sharpen:
            return {"token_ids": [0] * count}
        return {"token_ids": self._random.choices(range(3), (5, 3, 2), k=count)}

    def _answer_ids(self) -> dict[str, Any]:
        """One token after a prompt given as token ids, by `next_top`."""
        top = {f"token_id:{token}": value for token, value in self.behaviour.next_top.items()}
        best = max(self.behaviour.next_top, key=lambda token: self.behaviour.next_top[token])
        choice = {"text": "", "token_ids": [best], "logprobs": {"top_logprobs": [top]}}
        return {"choices": [choice], "usage": {"completion_tokens": 1}}

    async def _answer_stream(self, request: web.Request, prompt: str, tokens: list[int]) -> web.StreamResponse:
        behaviour, fault = self.behaviour, self.behaviour.faults.get(prompt)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment, as proxies send them\n\n")
        prompt_ids = [byte + behaviour.prompt_shift for byte in prompt.encode()]
        starts = range(0, len(tokens), behaviour.chunk_tokens)
        for number, start in enumerate(starts):
            if number == 2 and fault in ("error_event", "truncate", "no_done"):
                if fault == "error_event":
                    await self._write(response, {"error": {"message": "engine core died", "code": 500}})
                if fault == "truncate":
                    await response.write(b'data: {"choices": [{"te')
                if fault in ("truncate", "no_done"):
                    return response
                break
            chunk = tokens[start : start + behaviour.chunk_tokens]
            choice: dict[str, Any] = {"text": "".join(f" é{token}" for token in chunk)}
            if behaviour.ids:
                choice["token_ids"] = chunk
            if behaviour.other_text:
                choice["text"] += "!"
            if number == 0:
                choice["prompt_token_ids"] = prompt_ids
            if start + len(chunk) == len(tokens):
                choice["finish_reason"] = "length"
            await asyncio.sleep(behaviour.delay_s)
            await self._write(response, {"choices": [choice]})
            self._count_chunk(number, len(chunk))
        self._count_request(len(prompt_ids))
        usage = len(tokens) + (fault == "wrong_usage")
        await self._write(response, {"choices": [], "usage": {"completion_tokens": usage}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _write(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        line = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        size = self.behaviour.split_bytes or len(line)
        for start in range(0, len(line), size):
            await response.write(line[start : start + size])
            if self.behaviour.split_bytes:
                await asyncio.sleep(0)

    def _count_chunk(self, number: int, size: int) -> None:
        self.counters["generation"] += size
        gamma = self.behaviour.gamma
        if gamma and self.behaviour.count_drafts and number > 0:  # the first token is the prefill's
            self.counters["drafts"] += 1
            self.counters["draft_tokens"] += gamma
            self.counters["accepted"] += size - 1
            for position in range(size - 1):
                self.accepted_per_position[position] += 1

    def _count_request(self, prompt_tokens: int) -> None:
        self.counters["requests"] += 1
        self.counters["prompt"] += prompt_tokens
        self.counters["hits"] += self.behaviour.prefix_hits
        self.counters["generation"] += self.behaviour.foreign_tokens
