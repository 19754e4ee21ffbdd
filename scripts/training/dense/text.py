"""Rows to distil on: plain text end to end, and conversations with the assistant's tokens marked.

Sources: `toy:training` or `toy:held-out` (a half of the toy family's corpus, as text or as conversations), a text file,
or JSON lines: {"text": …} for text, {"messages": [{"role": …, "content": …}, …]} for conversations.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.text.rows import TOY, read_documents
from laguna_serve.serving.kit.errors import CommandError

SYSTEM_SHARE = 0.2  # of the toy's conversations


class TextError(CommandError, ValueError):
    """A source that cannot be distilled on, as one line."""


@dataclass(frozen=True, slots=True)
class Text:
    """Documents end to end: [N] int64."""

    ids: torch.Tensor

    def batch(self, seed: str, rows: int, length: int) -> torch.Tensor:
        """Rows [rows, length] int64 from random places."""
        rng = random.Random(seed)
        starts = [rng.randrange(len(self.ids) - length + 1) for _ in range(rows)]
        return torch.stack([self.ids[start : start + length] for start in starts])


@dataclass(frozen=True, slots=True)
class Chats:
    """Conversations: the ids of each, and which of them the assistant says."""

    ids: list[list[int]]
    spoken: list[list[bool]]

    def batch(self, seed: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random conversations end to end: ids [rows, length] int64, and the assistant's [rows, length] bool."""
        rng = random.Random(seed)
        pairs = [self._row(rng, length) for _ in range(rows)]
        return torch.tensor([ids for ids, _ in pairs]), torch.tensor([spoken for _, spoken in pairs])

    def _row(self, rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        spoken: list[bool] = []
        while len(ids) < length:
            chosen = rng.randrange(len(self.ids))
            ids += self.ids[chosen]
            spoken += self.spoken[chosen]
        return ids[:length], spoken[:length]


def read_text(source: str, tokenizer: Any, length: int) -> Text:
    """Tokenise a source of text.  Raises TextError when it has not one row of `length` tokens."""
    try:
        documents = read_documents(source)
    except PruningError as error:
        raise TextError(str(error)) from None
    ids = [i for document in documents for i in tokenizer(document, verbose=False)["input_ids"]]
    if len(ids) < length:
        raise TextError(f"{source}: expected at least {length} tokens of text, got {len(ids)}; pass more text")
    return Text(torch.tensor(ids))


def read_chats(source: str, tokenizer: Any) -> Chats:
    """Render conversations through the model's chat template.

    Raises:
        TextError: no conversations, a line that is none, a template that is missing or marks no assistant's tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(f"{source}: expected a tokenizer with a chat template, got none; add chat_template.jinja")
    conversations = _read_toy(TOY[source]) if source in TOY else _read_jsonl(source)
    chats = Chats([], [])
    for messages in conversations:
        ids, spoken = render(messages, tokenizer)
        if any(spoken):
            chats.ids.append(ids)
            chats.spoken.append(spoken)
    if not chats.ids:
        raise TextError(f"{source}: expected conversations with an assistant's turn, got none; pass others")
    return chats


def render(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    Those are what the template marks with `{% generation %}`, else all that a turn adds to the prompt before it.
    """
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    turns: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            answered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not (answered.startswith(asked) and text.startswith(answered)):
                expected = "a chat template whose turns only add text, or that marks {% generation %}"
                raise TextError(f"chat template: expected {expected}, got one that rewrites earlier turns; mark it")
            turns.append((len(asked), len(answered)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(a <= start < b for a, b in turns) for start in starts]


def _read_toy(held_out: bool) -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    modules = [m for m in corpus.read_modules() if m.held_out == held_out]
    return [corpus.conversation(f, rng.random() < SYSTEM_SHARE) for m in modules for f in corpus.functions(m)]


def _read_jsonl(source: str) -> list[list[dict[str, str]]]:
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        expected = f"a JSON Lines file, or one of {', '.join(TOY)}"
        raise TextError(f"{source}: expected {expected}, got one that cannot be read ({error}); check it") from None
    conversations = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            conversations.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (ValueError, KeyError, TypeError):
            expected = '{"messages": [{"role": …, "content": …}, …]}'
            raise TextError(f"{source}: expected {expected}, got {line[:40]!r} in line {number}; fix it") from None
    return conversations
