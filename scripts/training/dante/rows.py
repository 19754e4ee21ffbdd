"""A cache's records as rows of token ids by the student's own tokenizer, in the order in which they are taught.

A prompt is context and never a target. An answer that was cut off, by the teacher's limit or by the row's, ends
without the end token: it does not teach where to stop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from laguna_serve.scripts.training.dante.losses import CENTER, IGNORED
from laguna_serve.scripts.training.dante.records import CacheError, CacheRecord, Prompt
from laguna_serve.serving.kit.errors import first_line

Curriculum = Literal["output_entropy", "difficulty_score", "none"]
EntropyScale = Literal["nats", "rank"]


@dataclass(frozen=True, slots=True)
class TaughtRow:
    """One record: ids [n], what of them is to be predicted [n] (`IGNORED` elsewhere), and what the weight is of."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    entropy: float


@dataclass(frozen=True, slots=True)
class TaughtRows:
    """Rows in their order; `cut`: answers without an end; `left_out`: prompts that leave no room."""

    rows: list[TaughtRow]
    cut: int
    left_out: int


def draw_records(records: Sequence[CacheRecord], share: float, seed: int) -> list[CacheRecord]:
    """Draw a share of the records at random, in their order."""
    count = max(1, round(share * len(records)))
    return [records[place] for place in sorted(random.Random(seed).sample(range(len(records)), count))]


def order_records(records: Sequence[CacheRecord], curriculum: Curriculum) -> list[CacheRecord]:
    """Sort from easy to hard, equal ones in their order; unsorted without a curriculum."""
    if curriculum == "none":
        return list(records)
    return sorted(records, key=lambda record: float(getattr(record, curriculum)))


def rank_entropies(entropies: Sequence[float]) -> list[float]:
    """Return each entropy's rank among all, spread from 0 to twice the weight's centre, so that half lie on each side.

    In nats an instruct model's entropies lie so close together that the weight is almost a constant.
    """
    places = sorted(range(len(entropies)), key=lambda place: entropies[place])
    ranks = [0.0] * len(entropies)
    for number, place in enumerate(places):
        ranks[place] = 2 * CENTER * number / max(1, len(entropies) - 1)
    return ranks


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Encode a text as the tokenizer does, or a conversation by the chat template, up to where the answer begins.

    Raises:
        CacheError: there is no template, or it refuses the conversation.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    try:
        return list(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False))
    except Exception as error:
        reason = first_line(error)
        raise CacheError(f"prompt: expected messages that the student's template takes, got: {reason}") from None


def encode_records(
    records: Sequence[CacheRecord], tokenizer: Any, length: int, scale: EntropyScale = "nats"
) -> TaughtRows:
    """Encode records in their order, of `length` tokens at most.

    Raises:
        CacheError: no answer fits, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise CacheError(
            "student: expected a tokenizer with an end token (eos_token), got none; name one in its config"
        )
    values = [record.output_entropy for record in records]
    entropies = rank_entropies(values) if scale == "rank" else values
    rows, cut = [], 0
    for record, entropy in zip(records, entropies, strict=True):
        asked = encode_prompt(record.prompt, tokenizer)
        answer = list(tokenizer(record.teacher_text, add_special_tokens=False, verbose=False)["input_ids"])
        if not record.is_cut_off:
            answer.append(tokenizer.eos_token_id)
        room = length - len(asked)
        if not asked or room < 1 or not answer:
            continue
        cut += record.is_cut_off or len(answer) > room
        taught = answer[:room]
        rows.append(TaughtRow((*asked, *taught), (*[IGNORED] * len(asked), *taught), entropy))
    if not rows:
        raise CacheError(f"--length: expected room for an answer, got none in {length} tokens; raise it")
    return TaughtRows(rows, cut, len(records) - len(rows))
