"""Prompts whose greedy continuations by the teacher its drafters learn from."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerFast

from laguna_serve.scripts.text.corpus import Module, conversation, cuts, functions

COUNT = 4800
CHAT_SHARE = 0.15
NEW_TOKENS = 160
LONGEST_PROMPT = 256


def draw_prompts(modules: list[Module], tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[list[int]]:
    """Prompts as users send them: code to continue, and some chat requests; token ids, none longer than the limit."""
    rng = random.Random(seed)
    code = [tokenizer(c["prompt"])["input_ids"] for c in cuts(modules, 2 * count, seed, lines=(3, 20))]
    asked = [conversation(f, system=rng.random() < 0.2)[:-1] for m in modules for f in functions(m)]
    chats = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)
        for c in rng.sample(asked, min(len(asked), count))
    ]
    code, chats = ([p for p in prompts if len(p) <= LONGEST_PROMPT] for prompts in (code, chats))
    wanted = min(len(chats), int(count * CHAT_SHARE))
    return [*code[: count - wanted], *chats[:wanted]]
