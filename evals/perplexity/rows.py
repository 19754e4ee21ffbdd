"""What a loss is measured on: text cut into rows of tokens, or the rows of a cached token array.

A row is sent whole and scored from its token `first` on; what lies before is context. No row crosses from one document
into the next. Bad files are refused before anything is sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import is_whole, load_array, number_lines


class RowsError(CommandError, ValueError):
    """A text or a token array that a loss cannot be measured on, as one line."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids that are sent as one prompt.

    `first`, at least 1: the first one that is scored; `document`: the number of the document, or row of the array, that
    it comes from.
    """

    document: int
    tokens: tuple[int, ...]
    first: int = 1

    @property
    def scored(self) -> int:
        """How many of its tokens are scored."""
        return len(self.tokens) - self.first


def read_documents(path: Path) -> list[str]:
    """Read the documents of a UTF-8 file: of a .jsonl the "text" or "prompt" of every line, else the file as it is.

    Raises:
        RowsError: the file is missing, empty or of another kind.
    """
    try:
        # As bytes: read_text would turn \r\n into \n.
        documents = list(_read_lines(path)) if path.suffix == ".jsonl" else [path.read_bytes().decode("utf-8-sig")]
    except OSError as error:
        raise RowsError(f"{path}: expected a text file, got {error.strerror}; check --text") from error
    except UnicodeDecodeError as error:
        raise RowsError(f"{path}: expected UTF-8 text, got {error}; re-encode the file") from error
    if not any(documents):
        raise RowsError(f"{path}: expected text, got an empty file; check --text")
    return documents


def _read_lines(path: Path) -> Iterator[str]:
    for number, line in number_lines(path):
        try:
            item = json.loads(line)
            found = item["text"] if "text" in item else item["prompt"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str) or not is_whole(found):
            expected = 'an object with a "text" or "prompt"'
            raise RowsError(f"{path}:{number}: expected {expected}, got {line[:40]!r}; fix the line")
        yield found


def cut_rows(document: int, tokens: Sequence[int], length: int, stride: int) -> list[Row]:
    """Windows of `length` tokens, the next one `stride` tokens further on; each scores what none before it did.

    With stride = length a row's first token has no context and is not scored. With less, every token but the
    document's first is scored once, and after the first row with at least `length` − `stride` tokens before it.
    """
    rows: list[Row] = []
    overlap = length - stride
    for start in range(0, len(tokens), stride):
        row = Row(document, tuple(tokens[start : start + length]), max(1, overlap) if start else 1)
        if row.scored > 0:
            rows.append(row)
        if start + length >= len(tokens):
            break
    return rows


def choose_evenly(rows: Sequence[Row], wanted: int | None) -> list[Row]:
    """`wanted` evenly spaced rows; all of them where there are no more, or with None."""
    if wanted is None or wanted >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // wanted] for index in range(wanted)]


def read_array(path: Path, pad_id: int | None) -> list[Row]:
    """Read the rows of an integer array [N, L] without the padding at their ends.

    A row that is padding alone is left out.

    Raises:
        RowsError: the file is no such array, an id is negative, or a row has one token.
    """
    array = _load(path)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        got = f"{array.dtype} {list(array.shape)}"
        raise RowsError(f"{path}: expected integer token ids [N, L], got {got}; save the ids, a row per sequence")
    if array.size and int(array.min()) < 0 and (pad_id is None or pad_id >= 0):
        row, column = np.argwhere(array < 0)[0]
        where = f"{array[row, column]} in row {row}, column {column}"
        raise RowsError(f"{path}: expected token ids of at least 0, got {where}; name padding by --pad-id")
    rows = [Row(number, tuple(_trim(ids, pad_id).tolist())) for number, ids in enumerate(array)]
    short = next((row for row in rows if len(row.tokens) == 1), None)
    if short is not None:
        raise RowsError(f"{path}: expected rows of at least 2 tokens, got 1 in row {short.document}; remove the row")
    rows = [row for row in rows if row.tokens]
    if not rows:
        raise RowsError(f"{path}: expected rows of token ids, got {list(array.shape)} with none; check --tokens")
    return rows


def _load(path: Path) -> npt.NDArray[Any]:
    try:
        return load_array(path)
    except OSError as error:
        raise RowsError(
            f"{path}: expected a NumPy file (.npy), got {error.strerror or error}; check --tokens"
        ) from error
    except ValueError as error:
        raise RowsError(f"{path}: expected a NumPy file (.npy), got one that cannot be read ({error})") from error


def _trim(ids: npt.NDArray[Any], pad_id: int | None) -> npt.NDArray[Any]:
    if pad_id is None:
        return ids
    kept = np.flatnonzero(ids != pad_id)
    return ids[kept[0] : kept[-1] + 1] if len(kept) else ids[:0]


def check_length(rows: Sequence[Row], most: int, source: str) -> None:
    """Raise RowsError unless every row has at most `most` tokens."""
    longest = max(rows, key=lambda row: len(row.tokens))
    if len(longest.tokens) > most:
        expected = f"expected rows of at most {most} tokens (the endpoint's longest sequence less one that it writes)"
        got = f"got {len(longest.tokens)} in row {longest.document}"
        raise RowsError(f"{source}: {expected}, {got}; serve with a larger --max-model-len or cut the rows")


def digest_rows(rows: Sequence[Row]) -> str:
    """SHA-256 of what is sent and scored."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.document, row.first, row.tokens]).encode())
    return digest.hexdigest()
