"""A fake vLLM endpoint in a thread that answers code problems with given texts: one token per character, real HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fake_server import FakeServer

END = 0


@dataclass
class Manners:
    """How the endpoint answers. `variants`: what may be said to a prompt; `choose` gets the prompt and how often it was
    asked before, and says which of them. `margin`: nats between the two best tokens. `broken`: prompts that fail.
    `drafts`: drafts counted per answer, two tokens of three accepted; None: there are no counters."""

    variants: Mapping[str, tuple[str, ...]]
    choose: Callable[[str, int], int] = lambda _prompt, _asked: 0
    margin: float = 0.5
    broken: set[str] = field(default_factory=set)
    prompt_shift: int = 0
    ids: bool = True
    drafts: int | None = None


class FakeArm(FakeServer):
    """Context manager; `url` is its address, `seen` the prompts in the order in which they came."""

    def __init__(self, manners: Manners, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.manners = manners
        self.seen: list[str] = []
        self._log, self._name = log if log is not None else [], name
        self._asked: Counter[str] = Counter()

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        asked = [web.get("/v1/models", self._models), web.post("/v1/completions", self._complete)]
        counted = [web.get("/metrics", self._metrics)] if self.manners.drafts is not None else []
        return [*asked, *counted, web.post("/v1/chat/completions", self._chat)]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        drafts = (self.manners.drafts or 0) * len(self.seen)
        counts = {"generation_tokens": 1, "spec_decode_num_drafts": drafts}
        counts |= {"spec_decode_num_draft_tokens": 3 * drafts, "spec_decode_num_accepted_tokens": 2 * drafts}
        return web.Response(text="".join(f"vllm:{name}_total {float(count)}\n" for name, count in counts.items()))

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert (body["temperature"], body["ignore_eos"], body["logprobs"]) == (0, False, 2)
        if (said := self._say(body["prompt"], body["max_tokens"])) is None:
            return web.json_response({"error": {"message": "out of luck"}}, status=500)
        text, ids, top = said
        choice: dict[str, Any] = {"text": text, "logprobs": {"top_logprobs": top}}
        if self.manners.ids:
            choice |= {"token_ids": ids, "prompt_token_ids": self._read(body["prompt"])}
        return web.json_response({"choices": [choice]})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 2)
        prompt = body["messages"][0]["content"]
        if (said := self._say(prompt, body["max_tokens"])) is None:
            return web.json_response({"error": {"message": "out of luck"}}, status=500)
        text, ids, top = said
        content = []
        for token, step in zip(ids, top, strict=True):
            best = [{"token": name, "logprob": value} for name, value in step.items()]
            content.append({"token": f"token_id:{token}", "logprob": step[f"token_id:{token}"], "top_logprobs": best})
        choice = {"message": {"content": text}, "token_ids": ids, "logprobs": {"content": content}}
        return web.json_response({"choices": [choice], "prompt_token_ids": self._read(prompt)})

    def _read(self, prompt: str) -> list[int]:
        return [ord(character) + self.manners.prompt_shift for character in prompt]

    def _say(self, prompt: str, max_tokens: int) -> tuple[str, list[int], list[dict[str, float]]] | None:
        """Text, token ids, and of every step the log-probabilities of the best two: a token where another variant would
        go on differently has that one as its rival."""
        self.seen.append(prompt)
        self._log.append(self._name)
        if prompt in self.manners.broken:
            return None
        variants = self.manners.variants[prompt]
        text = variants[self.manners.choose(prompt, self._asked[prompt])]
        self._asked[prompt] += 1
        ids = [*map(ord, text), END][:max_tokens]
        top = []
        for index, token in enumerate(ids):
            rivals = [[*map(ord, other), END][index] for other in variants if other[:index] == text[:index]]
            rival = next((rival for rival in rivals if rival != token), token + 1)
            top.append({f"token_id:{token}": -0.1, f"token_id:{rival}": -0.1 - self.manners.margin})
        return text[:max_tokens], ids, top
