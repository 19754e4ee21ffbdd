"""The API keys of `laguna serve`: from a flag, a file or the environment. They are in no message and no log."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.planning.launch import KEY_VARIABLES

FILE_MARK = "@"


def read_keys(given: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Read the keys given as KEY or @FILE (one per line), else that of the environment; none: everybody may ask.

    Raises:
        CheckpointError: a file cannot be read or holds no key, or a key cannot travel in a header.
    """
    keys = [key for text in given for key in (_read_file(text[1:]) if text.startswith(FILE_MARK) else [text])]
    if not given:
        keys = [environment[name] for name in KEY_VARIABLES if environment.get(name)][:1]
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise CheckpointError(
                "--api-key: expected printable ASCII without spaces, got something else; choose another key"
            )
    return tuple(dict.fromkeys(keys))


def describe_keys(keys: Sequence[str]) -> list[dict[str, str]]:
    """Describe the gateway's table of keys: names by order, digests."""
    return [
        {"name": f"api-key-{number}", "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for number, key in enumerate(keys, 1)
    ]


def _read_file(name: str) -> list[str]:
    path = expand(name)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are no text"
        raise CheckpointError(f"--api-key @{path}: expected a file of keys, got {reason}; check the path") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise CheckpointError(f"--api-key @{path}: expected a key per line, got none; write one into it")
    return keys
