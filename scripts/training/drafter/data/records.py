"""What a drafter learns from and is measured on: answers of the target, checked, cut and split by prompt.

The split is by prompt, not by answer: answers to one prompt, as reinforcement learning has many, are all on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from laguna_serve.serving.client.traffic import TrafficError, TrafficRecord

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One answer: tokens [L] int32, the first `start` of them the prompt, sampled at `temperature`."""

    tokens: torch.Tensor
    start: int
    temperature: float

    @property
    def prompt(self) -> Prompt:
        """Token ids of the prompt, which answers share."""
        return tuple(self.tokens[: self.start].tolist())


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that can be used, in the order of their records, and how many could not: too short, or too long a prompt."""

    rows: list[Row]
    skipped: int

    @property
    def tokens(self) -> int:
        """Count the tokens of prompts and answers together."""
        return sum(len(row.tokens) for row in self.rows)


def make_rows(
    records: Iterable[TrafficRecord], *, source: str, vocabulary: int, max_length: int, shortest: int = 2
) -> Rows:
    """Check every record and cut it to `max_length` tokens.

    Records with fewer than `shortest` emitted tokens left are skipped: nothing follows an anchor in them.

    Raises:
        TrafficError: a token that the target does not have.
    """
    rows, skipped = [], 0
    for number, record in enumerate(records, start=1):
        tokens = np.asarray([*record.prompt_token_ids, *record.token_ids], dtype=np.int64)
        if tokens.max() >= vocabulary:
            expected = f"token ids below {vocabulary}, the target's vocabulary"
            got = f"{tokens.max()} in record {number}"
            raise TrafficError(f"{source}: expected {expected}, got {got}; was this recorded from another model?")
        start = len(record.prompt_token_ids)
        if min(len(tokens), max_length) - start < shortest:
            skipped += 1
        else:
            cut = torch.from_numpy(tokens[:max_length].astype(np.int32))
            rows.append(Row(cut, start, record.temperature))
    return Rows(rows, skipped)


def choose_held_out(prompts: Iterable[Prompt], count: int, source: str = "prompts") -> set[Prompt]:
    """Choose `count` of the different prompts, at most a quarter of them: those whose hashes are smallest.

    source: what they were read from, for the message.

    Raises:
        TrafficError: fewer than two different prompts.
    """
    different = {prompt: hash_prompt(prompt) for prompt in prompts}
    if len(different) < 2:
        expected = "at least two different prompts, one to learn from and one to measure on"
        raise TrafficError(f"{source}: expected {expected}, got {len(different)}; pass more")
    chosen = sorted(different, key=lambda prompt: different[prompt])
    return set(chosen[: max(1, min(count, len(chosen) // 4))])


def split_rows(rows: Sequence[Row], held_out: set[Prompt]) -> tuple[list[Row], list[Row]]:
    """Split rows into those to learn from and those to measure on."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[row.prompt in held_out].append(row)
    return sides


def hash_prompt(prompt: Prompt) -> str:
    """SHA-256 of token ids; of the whole prompt."""
    return hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).hexdigest()


def hash_rows(rows: Iterable[Row]) -> str:
    """SHA-256 of rows in their order: what states and training belong to."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row.tokens)} {row.start} {row.temperature!r} ".encode())
        digest.update(row.tokens.numpy().tobytes())
    return digest.hexdigest()
