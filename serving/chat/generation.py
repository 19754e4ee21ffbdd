"""A generation_config.json, held against what vLLM takes: else an engine dies of it, or refuses every request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from laguna_serve.serving.chat.template import read_object
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.fields import show
from laguna_serve.serving.kit.results import JsonObject

NAME = "generation_config.json"
MOST_TOP_K = (1 << 31) - 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


# Key → whether vLLM takes its value (SamplingParams._verify_args of 0.32), and what it takes, in words.
SAMPLING: dict[str, tuple[Callable[..., bool], str]] = {
    "temperature": (lambda value: 0 <= value <= 2, "a number from 0 to 2"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "top_k": (lambda value: type(value) is int and -1 <= value <= MOST_TOP_K, "a whole number, -1 or more"),
    "repetition_penalty": (lambda value: 0 < value <= sys.float_info.max, "a number above 0"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "max_new_tokens": (lambda value: type(value) is int and value >= 1, "a whole number, 1 or more"),
}


def check_generation(folder: Path, *, sampling: bool = True) -> None:
    """Check the file in a folder, if there is one: its ends, and with `sampling` what requests are drawn with.

    Raises:
        CheckpointError: it is no JSON object, or a value in it is none that an engine takes.
    """
    path = folder / NAME
    given = read_object(path)
    for key, (takes, expected) in SAMPLING.items() if sampling else ():
        value = given.get(key)
        if value is not None and not (_is_number(value) and takes(value)):
            raise _mismatch(path, key, expected, value)
    _check_ends(path, given)


def _check_ends(path: Path, given: JsonObject) -> None:
    ends = given.get("eos_token_id")
    if ends is not None and not all(map(_is_id, ends if isinstance(ends, list) else [ends])):
        raise _mismatch(path, "eos_token_id", "a token id, or a list of them", ends)


def _mismatch(path: Path, key: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(f"{path}: expected {key} to be {expected}, got {show(got)}; correct it, or fetch it again")
