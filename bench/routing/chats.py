"""A made-up trace of chats: sessions with a shared system prompt, each turn's prompt being all that was said before."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

# vLLM's prefix cache keeps whole blocks; a CPU's have 128 tokens.
BLOCK_TOKENS = 128
SYSTEM_PROMPTS, SYSTEM_TOKENS = 32, (512, 4096)
QUESTION_TOKENS, ANSWER_TOKENS = (32, 1024), (64, 768)
MEAN_TURNS, MEAN_PAUSE_S = 6, 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """A turn: when it comes, its prompt's tokens and whole blocks (equal beginnings have equal ids), its answer's."""

    at_s: float
    prompt_tokens: int
    blocks: tuple[int, ...]
    answer_tokens: int


def make_trace(sessions: int, per_s: float, seed: int) -> list[Request]:
    """Make the turns of so many sessions, which begin at random, `per_s` of them in a second; in order of time."""
    rng = random.Random(seed)
    ids = itertools.count()
    system = [_make_blocks(rng.randint(*SYSTEM_TOKENS), ids) for _ in range(SYSTEM_PROMPTS)]
    weights = [1 / (rank + 1) for rank in range(SYSTEM_PROMPTS)]
    requests, begins_s = list[Request](), 0.0
    for _ in range(sessions):
        begins_s += rng.expovariate(per_s)
        at_s, blocks = begins_s, list(rng.choices(system, weights)[0])
        tokens = len(blocks) * BLOCK_TOKENS
        for _ in range(1 + int(rng.expovariate(1 / (MEAN_TURNS - 1)))):
            tokens += rng.randint(*QUESTION_TOKENS)
            _grow(blocks, tokens, ids)
            answer = rng.randint(*ANSWER_TOKENS)
            requests.append(Request(at_s, tokens, tuple(blocks), answer))
            tokens += answer
            at_s += rng.expovariate(1 / MEAN_PAUSE_S) + 1.0
    return sorted(requests, key=lambda request: request.at_s)


def _make_blocks(tokens: int, ids: itertools.count[int]) -> list[int]:
    return [next(ids) for _ in range(tokens // BLOCK_TOKENS)]


def _grow(blocks: list[int], tokens: int, ids: itertools.count[int]) -> None:
    blocks += [next(ids) for _ in range(tokens // BLOCK_TOKENS - len(blocks))]
