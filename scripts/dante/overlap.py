"""Which texts share 13 words in a row with problems that the student will be evaluated on.

Words are runs of letters and digits, in small letters, so that neither layout nor punctuation hides a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from laguna_serve.scripts.training.dante.records import CacheError, Prompt
from laguna_serve.serving.kit.files import explain_read, number_lines

LENGTH = 13
WORDS = re.compile(r"\w+")


def list_grams(text: str) -> set[int]:
    """List a text's runs of LENGTH words, as hashes of this process; none of a shorter text."""
    words = WORDS.findall(text.lower())
    return {hash(tuple(words[start : start + LENGTH])) for start in range(len(words) - LENGTH + 1)}


def read_grams(paths: Sequence[Path]) -> set[int]:
    """Read the runs of every text in problem sets: JSON Lines, of which each text in a row is taken by itself.

    Raises:
        CacheError: a file cannot be read or is no JSON Lines.
    """
    found: set[int] = set()
    for path in paths:
        try:
            rows = [json.loads(line) for _, line in number_lines(path)]
        except (OSError, ValueError) as error:
            expected = "expected an evaluation's problems as JSON Lines"
            raise CacheError(f"--evaluations {path}: {expected}, {explain_read(error)}") from None
        for text in _list_texts(rows):
            found |= list_grams(text)
    return found


def join_text(prompt: Prompt) -> str:
    """Join what a prompt says: its text, or the contents of its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(_list_texts([m.get("content") for m in prompt]))


def _list_texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _list_texts(list(value.values()))
    elif isinstance(value, Iterable):
        for item in value:
            yield from _list_texts(item)
