"""Recorded traffic: JSON Lines of what was asked of a model and what it answered, as token ids and nothing else.

    {"prompt_token_ids": [1, 17, 4], "token_ids": [9, 9, 2], "temperature": 1.0}

A line is one answer: with `n` answers to a prompt it has `n` lines. No other field is read, so that text, keys and
names that stood beside the tokens cannot slip in. A drafter learns from such a file (`laguna drafter train --tokens`),
and what that command has generated itself is kept in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.serving.kit.errors import CommandError

TokenIds = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]


class TrafficError(CommandError):
    """A file that is not recorded traffic; one line that names the file's line."""


class TrafficRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="schema",
    tag="laguna_serve.traffic/1",
):
    """One answer of a model to one prompt; `schema` may be left out of a line.

    Attributes:
        prompt_token_ids: the whole prompt as the model saw it, the chat template's tokens included.
        token_ids: what the model emitted, an end token included.
        temperature: it was sampled at, from the model's whole distribution; 0 for its likeliest tokens.
        seed: of the request, where it had one.
        weight_version: of the weights that answered, where a policy moves.
    """

    prompt_token_ids: TokenIds
    token_ids: TokenIds
    temperature: Annotated[float, msgspec.Meta(ge=0)]
    seed: int | None = None
    weight_version: Annotated[str, msgspec.Meta(max_length=128)] | None = None


def read_traffic(path: Path) -> Iterator[TrafficRecord]:
    """Read a file, line by line; empty lines are passed over.

    A last line without its line break was cut off in writing, or is being written: if it is no record, it is left out.

    Raises:
        TrafficError: a line that is no record; OSError: the file cannot be read.
    """
    decoder = msgspec.json.Decoder(TrafficRecord)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                if not line.endswith(b"\n"):
                    return
                expected = "expected token ids and a temperature alone (laguna_serve.traffic/1)"
                raise TrafficError(f"{path}:{number}: {expected}, got a line where {error}; remove it") from None
            yield record
