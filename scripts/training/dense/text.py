"""Rows to distil on: plain text end to end, and conversations with the assistant's tokens marked.

Sources: `toy:training` or `toy:held-out` (a half of the toy family's corpus, as text or as conversations), a text file,
or JSON lines: {"text": …} for text, {"messages": [{"role": …, "content": …}, …]} for conversations. JSON lines are
read one at a time and kept as token ids on disk (tokens.py); a text file is one document and tokenised whole.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.text.rows import TOY, read_rows, stream_documents, stream_lines
from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.targets import Drawn, Source
from laguna_serve.scripts.training.dense.tokens import Encoded, Tokens, open_tokens, write_tokens
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import explain_read, is_whole, number_lines

SYSTEM_SHARE = 0.2  # of the toy's conversations
# Of a user's own documents, where nothing else is named to measure on.
ONE_ASIDE_IN = 50
MEASURED_ROWS = 64


class TextError(CommandError, ValueError):
    """A source that cannot be distilled on, as one line."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Documents end to end, of which rows are drawn."""

    tokens: Tokens

    def batch(self, seed: str, rows: int, length: int) -> torch.Tensor:
        """Rows [rows, length] int64 from random places."""
        rng = random.Random(seed)
        ids = self.tokens.ids
        starts = [rng.randrange(len(ids) - length + 1) for _ in range(rows)]
        return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]).astype(np.int64))

    def spoken_batch(self, seed: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as of `batch`, every token of which is to be learned: the form of `Chats.spoken_batch`."""
        ids = self.batch(seed, rows, length)
        return ids, torch.ones_like(ids, dtype=torch.bool)


@dataclass(frozen=True, slots=True, eq=False)
class Chats:
    """Conversations, of which rows are put together."""

    tokens: Tokens

    def batch(self, seed: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random conversations end to end: ids [rows, length] int64, and the assistant's [rows, length] bool."""
        rng = random.Random(seed)
        pairs = [self._row(rng, length) for _ in range(rows)]
        ids, spoken = (torch.from_numpy(np.stack(parts)) for parts in zip(*pairs, strict=True))
        return ids.long(), spoken.bool()

    spoken_batch = batch

    def _row(self, rng: random.Random, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        parts: list[slice] = []
        count = 0
        while count < length:
            chosen = rng.randrange(self.tokens.documents)
            start, stop = self.tokens.starts[chosen : chosen + 2].tolist()
            parts.append(slice(start, stop))
            count += stop - start
        ids = np.concatenate([self.tokens.ids[part] for part in parts])[:length]
        return ids.astype(np.int64), np.concatenate([self.tokens.spoken[part] for part in parts])[:length]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is measured on: documents of a source, all or those that are set aside; `learned`: they are trained on."""

    source: str
    aside: bool | None = None
    learned: bool = False

    def describe(self) -> str:
        """Describe the text for the result and the model's card."""
        if self.learned:
            return f"{self.source}, which was trained on: it has too few documents to set one in {ONE_ASIDE_IN} aside"
        return f"one in {ONE_ASIDE_IN} documents of {self.source}" if self.aside else self.source


@dataclass(slots=True)
class Corpus:
    """What is trained on and what is measured on."""

    training: Text
    rows: list[torch.Tensor]
    drawn: Drawn
    held_out_text: HeldOut
    held_out_chats: HeldOut

    def describe_held_out(self) -> dict[str, str]:
        """Say what it was measured on."""
        return {"held_out_text": self.held_out_text.describe(), "held_out_chats": self.held_out_chats.describe()}


def read_corpus(config: DistillConfig, tokenizer: Any, work: Path, ranks: Ranks) -> Corpus:
    """Make everything tokens: the first process writes them, the others map what it wrote. Raises TextError."""
    if ranks.first:
        corpus = _read_corpus(config, tokenizer, work)
    ranks.wait()
    return corpus if ranks.first else _read_corpus(config, tokenizer, work)


def _read_corpus(config: DistillConfig, tokenizer: Any, work: Path) -> Corpus:
    """Make tokens of both, and of what is set aside of them, where both parts are long enough."""
    check_text(config.text)  # before conversations are made tokens
    chats_apart, text_apart = _choose(config.held_out_chats, config.chats), _choose(config.held_out_text, config.text)
    others: Chats | None = None
    apart: Text | None = None
    # Each in a folder of its own: what one process has mapped no other one writes again.
    with suppress(TextError):  # what is wrong with the source itself is said below
        if chats_apart.aside:
            found = read_chats(config.chats, tokenizer, work / "held-out", aside=True)
            chats = read_chats(config.chats, tokenizer, work / "chats-rest", aside=False)
            others = found
    with suppress(TextError):
        if text_apart.aside:
            rest = read_text(config.text, tokenizer, config.length, work / "held-out-text", aside=True)
            training = read_text(config.text, tokenizer, config.length, work / "text-rest", aside=False)
            apart = rest
    if others is None:  # too few to set any aside, or none need be
        chats_apart = HeldOut(config.chats, learned=True) if chats_apart.aside else chats_apart
        chats = read_chats(config.chats, tokenizer, work / "chats")
        others = chats if chats_apart.learned else read_chats(chats_apart.source, tokenizer, work / "held-out")
    if apart is None:
        text_apart = HeldOut(config.text, learned=True) if text_apart.aside else text_apart
        training = read_text(config.text, tokenizer, config.length, work / "text")
    if text_apart.aside or text_apart.learned:
        count = min(MEASURED_ROWS, config.measure_tokens // config.length + 1)
        rows = list((apart or training).batch("held-out", count, config.length))
    else:
        rows = read_rows(text_apart.source, tokenizer, config.length, config.measure_tokens).rows
    source: Source = chats if config.stage2_on == "chats" else training
    return Corpus(training, rows, Drawn(source, others, config.recipe), text_apart, chats_apart)


def _choose(named: str | None, training: str) -> HeldOut:
    """Choose what is measured on: what is named, the toy's other half, or documents that are set aside."""
    if named is not None or training in TOY:
        other = named or training.replace(":training", ":held-out")
        return HeldOut(other, learned=other == training)
    return HeldOut(training, aside=True)


def check_text(source: str) -> None:
    """Refuse a text that cannot be opened, before anything is made tokens. Raises TextError."""
    try:
        if source not in TOY:
            next(stream_lines(source), None)
    except PruningError as error:
        raise TextError(str(error)) from None


def is_aside(document: object) -> bool:
    """Whether this is one of fifty documents that are set aside, by what it says: equal ones are together."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") % ONE_ASIDE_IN == 0


def read_text(source: str, tokenizer: Any, length: int, folder: Path | None = None, aside: bool | None = None) -> Text:
    """Tokenise a source of text, into `folder` where one is given and does not hold it yet.

    Args:
        aside: only the documents that are set aside, or only the others; None for all.
    Raises:
        TextError: it has not one row of `length` tokens, or cannot be read.
    """

    def encode() -> Iterator[Encoded]:
        for document in stream_documents(source):
            if aside is not None and is_aside(document) != aside:
                continue
            ids = tokenizer(document, verbose=False)["input_ids"]
            yield ids, [True] * len(ids)

    try:
        tokens = _open_or_write(source, tokenizer, encode(), folder, aside)
    except PruningError as error:
        raise TextError(str(error)) from None
    if len(tokens.ids) < length:
        raise TextError(f"{source}: expected at least {length} tokens of text, got {len(tokens.ids)}; pass more text")
    return Text(tokens)


def read_chats(source: str, tokenizer: Any, folder: Path | None = None, aside: bool | None = None) -> Chats:
    """Render conversations through the model's chat template, into `folder`, those of `aside`, as `read_text`.

    Raises:
        TextError: no conversations, a line that is none, a template that is missing or marks no assistant's tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(f"{source}: expected a tokenizer with a chat template, got none; add chat_template.jinja")

    def encode() -> Iterator[Encoded]:
        for messages in stream_conversations(source, aside):
            ids, spoken = render(messages, tokenizer)
            if any(spoken):
                yield ids, spoken

    tokens = _open_or_write(source, tokenizer, encode(), folder, aside)
    if not tokens.documents:
        raise TextError(f"{source}: expected conversations with an assistant's turn, got none; pass others")
    return Chats(tokens)


def _open_or_write(
    source: str, tokenizer: Any, encoded: Iterable[Encoded], folder: Path | None, aside: bool | None
) -> Tokens:
    """Map the tokens that the folder has of this very file and tokenizer, else write them."""
    key = {"source": source, "tokenizer": digest_tokenizer(tokenizer)}
    if aside is not None:
        key["aside"] = str(aside)
    if source not in TOY and Path(source).is_file():
        found = Path(source).stat()
        key["file"] = f"{found.st_size} bytes of {found.st_mtime_ns}"
    opened = open_tokens(folder, key) if folder is not None else None
    return opened or write_tokens(encoded, folder, key)


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's rules and its chat template, in hex."""
    rules = tokenizer.backend_tokenizer.to_str() + (getattr(tokenizer, "chat_template", None) or "")
    return hashlib.sha256(rules.encode()).hexdigest()


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


def stream_conversations(source: str, aside: bool | None = None) -> Iterator[list[dict[str, str]]]:
    """Read a source's conversations one after the other, those of `aside` as in `read_text`. Raises TextError."""
    conversations = _stream_toy(TOY[source]) if source in TOY else _stream_jsonl(source)
    return (each for each in conversations if aside is None or is_aside(each) == aside)


def _stream_toy(held_out: bool) -> Iterator[list[dict[str, str]]]:
    rng = random.Random(0)
    for module in corpus.read_modules():
        if module.held_out == held_out:
            for function in corpus.functions(module):
                yield corpus.conversation(function, rng.random() < SYSTEM_SHARE)


def _stream_jsonl(source: str) -> Iterator[list[dict[str, str]]]:
    number, line = 0, ""
    try:
        for number, line in number_lines(Path(source)):  # noqa: B007
            messages = json.loads(line)["messages"]
            if not all(isinstance(m["content"], str) and is_whole(m["content"]) for m in messages):
                raise TypeError("content")  # null beside tool calls, parts of an image: not what would be said
            yield [{"role": str(m["role"]), "content": m["content"]} for m in messages]
    except (OSError, UnicodeError) as error:
        expected = f"a JSON Lines file, or one of {', '.join(TOY)}"
        raise TextError(f"{source}: expected {expected}, {explain_read(error)}") from None
    except (ValueError, KeyError, TypeError):
        expected = '{"messages": [{"role": …, "content": …}, …]}'
        raise TextError(f"{source}: expected {expected}, got {line[:40]!r} in line {number}; fix it") from None
