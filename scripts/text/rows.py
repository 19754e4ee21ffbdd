"""Text to score experts on or to measure a loss on, as rows of token ids.

A source is a file or one half of the toy family's corpus, `toy:training` or `toy:held-out`. No row crosses from one
document into the next. Files:

    .txt           one document
    .jsonl         a document per line: "text" or "prompt", or a conversation, "messages" (and "tools"), of which what
                   the assistant says is scored: the chat template's {% generation %} part
    .npy           token ids [rows, tokens], as `chunks.npy` of published calibration caches
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laguna_serve.plugins.pruning import PruningError, load_array
from laguna_serve.scripts.text import corpus
from laguna_serve.serving.kit.errors import first_line
from laguna_serve.serving.kit.files import explain_read, is_whole

TOY = {"toy:training": False, "toy:held-out": True}
SHORTEST, LENGTH = 16, 384
TEXT = ("text", "prompt")
# Of long documents, whose last rows alone are shorter, rows count as whole.
NEARLY_WHOLE = 0.9


@dataclass(frozen=True, slots=True)
class TextRows:
    """Rows of token ids, and what they were cut from.

    Attributes:
        rows: [≤ length] int64 each.
        scored: [≤ length] bool each: which of its tokens are to be predicted; never the first.
        available: rows that the source has, of which these were taken.
    """

    source: str
    documents: int
    rows: list[torch.Tensor]
    scored: list[torch.Tensor]
    available: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and of which are scored, in hex."""
        digest = hashlib.sha256()
        for row, scored in zip(self.rows, self.scored, strict=True):
            digest.update(row.numpy().tobytes() + scored.numpy().tobytes() + b"/")
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(len(row) for row in self.rows)

    @property
    def targets(self) -> int:
        """Tokens that are predicted: of plain text, all but the first of every row."""
        return sum(int(row.sum()) for row in self.scored)


Document = tuple[torch.Tensor, torch.Tensor]


def read_rows(source: str, tokenizer: Any, length: int | None, tokens: int | None, seed: int | None = None) -> TextRows:
    """Cut the source into rows and take evenly spaced ones, about `tokens` tokens in all (everything if less).

    Args:
        length: None is LENGTH, and for token ids the file's own rows.
        tokens: None is everything.
        seed: draws the rows at random, without replacement, where they would be evenly spaced.

    Raises:
        PruningError: a source that is not there, is not text, or is too short for one row; rows too short.
    """
    if length is not None and length < SHORTEST:
        raise PruningError(f"--length: expected at least {SHORTEST} tokens in a row, got {length}; {LENGTH} are usual")
    documents = _read_encoded(source, tokenizer)
    longest = max((len(ids) for ids, _ in documents), default=0)
    cut = length or (longest if source.endswith(".npy") else LENGTH) or LENGTH
    rows = [row for document in documents for row in _cut(*document, cut)]
    if not rows:
        raise PruningError(f"{source}: expected at least {SHORTEST} tokens of text, got fewer; pass more text")
    mean = sum(len(ids) for ids, _ in rows) / len(rows)
    usual = cut if mean >= NEARLY_WHOLE * cut else mean
    wanted = len(rows) if tokens is None else min(len(rows), max(1, round(tokens / usual)))
    places = [i * len(rows) // wanted for i in range(wanted)]
    if seed is not None:
        places = sorted(np.random.default_rng(seed).choice(len(rows), wanted, replace=False).tolist())
    chosen = [rows[place] for place in places]
    return TextRows(source, len(documents), [ids for ids, _ in chosen], [scored for _, scored in chosen], len(rows))


def _cut(ids: torch.Tensor, scored: torch.Tensor, length: int) -> list[Document]:
    """Cut a document into rows that are long enough and have something to predict."""
    rows = []
    for part, wanted in zip(ids.split(length), scored.split(length), strict=True):
        wanted = wanted.clone()
        wanted[0] = False  # nothing comes before it
        if len(part) >= SHORTEST and wanted.any():
            rows.append((part, wanted))
    return rows


def _read_encoded(source: str, tokenizer: Any) -> list[Document]:
    if source.endswith(".npy"):
        return [_all_of(torch.from_numpy(row)) for row in _read_token_ids(source, len(tokenizer))]
    if source.endswith(".jsonl"):
        return [_encode(source, tokenizer, record) for record in _read_records(source)]
    return [_encode(source, tokenizer, {"text": text}) for text in read_documents(source)]


def _encode(source: str, tokenizer: Any, record: dict[str, Any]) -> Document:
    if "messages" not in record:
        return _all_of(torch.tensor(tokenizer(_find_text(record), verbose=False)["input_ids"], dtype=torch.int64))
    try:
        encoded = tokenizer.apply_chat_template(
            record["messages"],
            tools=record.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        reason = first_line(error)
        raise PruningError(f"{source}: expected messages that the chat template takes, got: {reason}") from None
    scored = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    if not scored.any() and any(message.get("role") == "assistant" for message in record["messages"]):
        expected = "a chat template that marks what the assistant says by {% generation %}"
        raise PruningError(f"{source}: expected {expected}, got one that marks nothing; pass the conversations as text")
    return torch.tensor(encoded["input_ids"], dtype=torch.int64), scored


def _all_of(ids: torch.Tensor) -> Document:
    return ids, torch.ones(len(ids), dtype=torch.bool)


def _read_token_ids(source: str, vocabulary: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    ids = load_array(Path(source), mapped=False)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        got = f"{ids.dtype} {list(ids.shape)}"
        raise PruningError(f"{source}: expected integers [rows, tokens], got {got}; pass the cache's chunks.npy")
    if ids.min() < 0 or ids.max() >= vocabulary:
        expected = f"token ids below {vocabulary}, this tokenizer's"
        raise PruningError(f"{source}: expected {expected}, got {ids.min()} to {ids.max()}; is it for this model?")
    return ids.astype(np.int64)


def _find_text(record: dict[str, Any]) -> str:
    text: str = record["text"] if "text" in record else record["prompt"]
    return text


def read_documents(source: str) -> list[str]:
    """Read the source's documents, in a fixed order."""
    return list(stream_documents(source))


def stream_documents(source: str) -> Iterator[str]:
    """Read the source's documents one after the other, of JSON lines and the toy's no more than one at a time."""
    if source in TOY:
        yield from (m.text for m in corpus.read_modules() if m.held_out == TOY[source])
    elif source.endswith(".jsonl"):
        for number, record in _number_records(source):
            yield _find_text(_require(source, record, number, TEXT))
    else:
        yield "".join(stream_lines(source))


def stream_lines(source: str) -> Iterator[str]:
    """Read a text file line by line, ends included. Raises PruningError when it cannot be read."""
    try:
        with Path(source).open(encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeError) as error:
        expected = f"a text file, or one of {', '.join(TOY)}"
        raise PruningError(f"{source}: expected {expected}, {explain_read(error)}") from None


def _read_records(source: str) -> list[dict[str, Any]]:
    return [_require(source, record, number, (*TEXT, "messages")) for number, record in _number_records(source)]


def _number_records(source: str) -> Iterator[tuple[int, Any]]:
    """(line number, what it says) of every line but blank ones; None for a line that is no JSON."""
    for number, line in enumerate(stream_lines(source), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield number, record


def _require(source: str, record: Any, number: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """Require an object with one of the keys, which is text but for messages. Raises PruningError naming the line."""
    if isinstance(record, dict):
        found = next((key for key in ("messages", *TEXT) if key in keys and key in record), None)
        if found == "messages" or (found is not None and isinstance(record[found], str) and is_whole(record[found])):
            return record
    expected = "an object with " + " or ".join(f'"{key}"' for key in keys)
    got = "no JSON" if record is None else json.dumps(record)[:40]
    raise PruningError(f"{source}: expected {expected}, got {got} in line {number}; fix it")
