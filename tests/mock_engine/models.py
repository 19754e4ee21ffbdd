"""What a mock engine says.

A model answers the body of a request with tokens, a text, an HTTP status to fail with, or the JSON of a whole answer.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mock_engine.engine import MockEngine
    from mock_engine.settings import Settings

Body = Mapping[str, Any]
VOCABULARY = 1000
END = 0
PLAIN_STEP_S = 0.01


@dataclass
class Said:
    """Token ids, their text, of every step the log-probabilities of the best tokens by name, and the prompt's ids."""

    ids: list[int]
    text: str
    top: list[dict[str, float]]
    prompt_ids: list[int]


Answer = Said | str | int | Mapping[str, Any]
Model = Callable[["MockEngine", Body], Answer]


def read_prompt(body: Body) -> Any:
    """The prompt, or what the first message says."""
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def render_chat(body: Body) -> str:
    """A conversation as the mock's chat template writes it."""
    thinks = body.get("chat_template_kwargs", {}).get("enable_thinking", False)
    return "".join(f"<{turn['role']}>{turn['content']}" for turn in body["messages"]) + "<think>" * thinks


def list_tokens(settings: Settings, prompt: str, count: int, *, again: bool = False) -> list[int]:
    """The greedy continuation of a prompt; from a flip on, every id is one higher."""
    seed = zlib.crc32(prompt.encode())
    tokens = [(seed // 7 + index * index * 31 + index) % (VOCABULARY - 2) for index in range(count)]
    flips = settings.flips_again if again and settings.flips_again else settings.flips
    flip = flips.get(prompt, count)
    return [token + (index >= flip) for index, token in enumerate(tokens)]


def say_text(tokens: Sequence[int]) -> str:
    """A word for each."""
    return "".join(f" é{token}" for token in tokens)


def say_greedily(settings: Settings, prompt: str, count: int) -> Said:
    """The continuation, asked for in one piece, with the two best tokens of every step."""
    tokens = list_tokens(settings, prompt, count, again=True)
    flip = min(settings.flips.get(prompt, len(tokens)), len(tokens))
    top = []
    for index, token in enumerate(tokens):
        other = token - 1 if settings.flips.get(prompt) == index else token + 1
        if settings.hide_second and index == flip:
            other = token + 7
        best = -0.7 + (settings.noise if index < flip else 0.0)
        top.append({f"token_id:{token}": best, f"token_id:{other}": -0.7 - settings.margin})
    return Said(tokens, say_text(tokens), top, [byte + settings.prompt_shift for byte in prompt.encode()])


def say_next(settings: Settings, prompt: Sequence[int]) -> Said:
    """One token after a prompt of token ids, by `next_top`."""
    best = max(settings.next_top, key=lambda token: settings.next_top[token])
    top = {f"token_id:{token}": value for token, value in settings.next_top.items()}
    return Said([best], "", [top], list(prompt))


def sample(settings: Settings, body: Body, asked: int) -> dict[str, Any]:
    """Completions over three tokens; a share of `sharpen` are the likeliest one instead.

    The same ones for the same requests, in the same order.
    """
    source = random.Random(f"{asked} {body['prompt']}")

    def draw() -> dict[str, Any]:
        count = body["max_tokens"]
        if source.random() < settings.sharpen:
            return {"token_ids": [0] * count}
        return {"token_ids": source.choices(range(3), (5, 3, 2), k=count)}

    return {"choices": [draw() for _ in range(body["n"])]}


@dataclass
class Variants:
    """Says one of several texts to a prompt, a token per character.

    `choose` gets the prompt and how often it was asked before. A token where another variant would go on differently
    has that one as its rival, `margin` nats below. Requests must be greedy and ask for the two best.
    """

    texts: Mapping[str, tuple[str, ...]]
    choose: Callable[[str, int], int] = lambda _prompt, _asked: 0
    margin: float = 0.5
    asked: Counter[str] = field(default_factory=Counter)

    def __call__(self, engine: MockEngine, body: Body) -> Answer:
        if "messages" in body:
            assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 2)
        else:
            assert (body["temperature"], body["ignore_eos"], body["logprobs"]) == (0, False, 2)
        prompt, max_tokens = read_prompt(body), body["max_tokens"]
        variants = self.texts[prompt]
        text = variants[self.choose(prompt, self.asked[prompt])]
        self.asked[prompt] += 1
        ids = [*map(ord, text), END][:max_tokens]
        top = []
        for index, token in enumerate(ids):
            rivals = [[*map(ord, other), END][index] for other in variants if other[:index] == text[:index]]
            rival = next((rival for rival in rivals if rival != token), token + 1)
            top.append({f"token_id:{token}": -0.1, f"token_id:{rival}": -0.1 - self.margin})
        read = [ord(character) + engine.settings.prompt_shift for character in prompt]
        return Said(ids, text[:max_tokens], top, read)


@dataclass
class Rollouts:
    """Says `n` completions of the same tokens with their log-probabilities, and adds to the clock what that took.

    It says `tau[version]` tokens per step where it drafts; a step costs `cost` plain ones. A `foreign` one counts a
    token that nobody was sent.
    """

    tau: Mapping[str, int]
    cost: float = 1.0
    foreign: bool = False

    def __call__(self, engine: MockEngine, body: Body) -> Answer:
        count, counters, clock = body["max_tokens"], engine.counters, engine.settings.clock
        assert engine.settings.weights is not None
        step = self.tau[engine.settings.weights.version] if counters.gamma else 1
        for _ in range(body["n"]):
            for number, start in enumerate(range(0, count, step)):
                counters.count_chunk(number, min(step, count - start))
        counters.generation += self.foreign
        uneven = 0.9 + zlib.crc32(f"{body['prompt']}{bool(counters.gamma)}".encode()) % 21 / 100
        if clock is not None:
            clock.advance(uneven * self.cost * PLAIN_STEP_S * count / step)
        choice = {"token_ids": list(range(count)), "logprobs": {"token_logprobs": [-1.0] * count}}
        return {"choices": [choice] * body["n"]}
