"""A cache of a teacher's answers: records in JSON Lines, a folder of shards.

Text and a few numbers alone cross from teacher to student. `output_entropy` does need the teacher's distribution: it
is the mean over the greedy answer's tokens of the entropy of the `top_k` likeliest ones with all others lumped as one
outcome of `tail_mass`, and so a lower bound.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import explain_read, is_whole, number_lines
from laguna_serve.serving.kit.results import JsonObject

SHARDS = "shard-*.jsonl"
CUT_OFF = "length"

Prompt = str | tuple[JsonObject, ...]


class CacheError(CommandError):
    """A cache, or prompts for one, that cannot be used."""


class CacheRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and what the teacher said to it.

    Attributes:
        prompt: text to continue, or a conversation's messages.
        teacher_text: the greedy answer.
        output_entropy: nats, mean over the answer's tokens; a lower bound.
        self_consistency: share of the sampled answers that come to what the greedy one comes to.
        difficulty_score: mean of the entropy's rank (0 to 1) and 1 − self_consistency.
        finish_reason: "stop", or "length" of an answer that was cut off.
        weight_version: of the teacher's weights, where the endpoint says.
        top_k: likeliest tokens that the entropy is of.
        tail_mass: probability of all others, mean over the tokens.
    """

    prompt: Prompt
    teacher_text: str
    output_entropy: float
    self_consistency: float
    difficulty_score: float
    finish_reason: str
    teacher: str
    weight_version: str | None
    top_k: int
    tail_mass: float

    @property
    def is_cut_off(self) -> bool:
        """Whether the answer ended at the limit of tokens, and so says nothing of where to stop."""
        return self.finish_reason == CUT_OFF


def read_cache(folder: Path) -> list[CacheRecord]:
    """Read every record of a cache's shards, or of one file, in order.

    Raises:
        CacheError: there is none, or a line is no such record.
    """
    paths = [folder] if folder.is_file() else sorted(folder.glob(SHARDS))
    records = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append(msgspec.convert(json.loads(line), CacheRecord))
            except ValueError as error:
                raise CacheError(f"{path}:{number}: expected a record of a cache, got one where {error}") from None
    if not records:
        remedy = "make it with scripts/dante cache"
        raise CacheError(f"{folder}: expected a cache ({SHARDS}), got none; {remedy}")
    return records


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts, JSON Lines of {"prompt": text} or {"messages": […]}, in order, with duplicates.

    Raises:
        CacheError: the file cannot be read, holds none, or a line is no prompt.
    """
    try:
        lines = list(number_lines(path))
    except (OSError, UnicodeError) as error:
        raise CacheError(f"{path}: expected JSON Lines of prompts, {explain_read(error)}") from None
    prompts = [_read_prompt(f"{path}:{number}", line) for number, line in lines]
    if not prompts:
        raise CacheError(f"{path}: expected prompts, got an empty file; scripts/toy_text.py --prompts N writes some")
    return prompts


def _read_prompt(place: str, line: str) -> Prompt:
    try:
        record = json.loads(line)
        prompt, messages = record.get("prompt"), record.get("messages")
    except (ValueError, AttributeError):
        prompt = messages = None
    if not is_whole(json.dumps([prompt, messages], ensure_ascii=False)):
        raise CacheError(f"{place}: expected whole characters, got half a surrogate pair; fix it")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return tuple(messages)
    raise CacheError(f'{place}: expected an object with "prompt" (text) or "messages", got {line[:40]}; fix it')
