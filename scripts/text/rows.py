"""Text to score experts on or to measure a loss on, as rows of token ids.

A source is a file (.txt, or .jsonl with a "text" or "prompt" per line) or one half of the toy family's corpus:
`toy:training` or `toy:held-out`.  No row crosses from one document into the next.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.text import corpus

TOY = {"toy:training": False, "toy:held-out": True}
SHORTEST = 16


@dataclass(frozen=True, slots=True)
class TextRows:
    """Rows of token ids [≤ length] int64 each, and what they were cut from."""

    source: str
    documents: int
    rows: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(len(row) for row in self.rows)

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but the first of every row."""
        return self.tokens - len(self.rows)


def read_rows(source: str, tokenizer: Any, length: int, tokens: int) -> TextRows:
    """Cut the source into rows and take evenly spaced ones, about `tokens` tokens in all (everything if less).

    Raises:
        PruningError: a source that is not there, is not text, or is too short for one row; rows too short.
    """
    if length < SHORTEST:
        raise PruningError(f"--length: expected at least {SHORTEST} tokens in a row, got {length}; 384 are usual")
    documents = read_documents(source)
    rows: list[torch.Tensor] = []
    for document in documents:
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
        rows += [row for row in ids.split(length) if len(row) >= SHORTEST]
    if not rows:
        raise PruningError(f"{source}: expected at least {SHORTEST} tokens of text, got fewer; pass more text")
    wanted = min(len(rows), max(1, round(tokens / length)))
    return TextRows(source, len(documents), [rows[i * len(rows) // wanted] for i in range(wanted)])


def read_documents(source: str) -> list[str]:
    """Read the source's documents, in a fixed order."""
    if source in TOY:
        return [m.text for m in corpus.read_modules() if m.held_out == TOY[source]]
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        expected = f"a text file, or one of {', '.join(TOY)}"
        raise PruningError(f"{source}: expected {expected}, got one that cannot be read ({error})") from None
    return _read_jsonl(source, text) if source.endswith(".jsonl") else [text]


def _read_jsonl(source: str, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            documents.append(str(record["text"] if "text" in record else record["prompt"]))
        except (ValueError, KeyError, TypeError):
            expected = 'an object with "text" or "prompt"'
            raise PruningError(f"{source}: expected {expected}, got {line[:40]!r} in line {number}; fix it") from None
    return documents
