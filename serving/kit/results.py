"""Result files: frozen msgspec structs, whose top level is tagged with its schema, as JSON.

    class LossResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.loss/1"):
        partial: bool
        environment: dict[str, Any]

A field that a later version added has a default, so that older files are read, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_json, write_text

R = TypeVar("R", bound=msgspec.Struct)
# What JSON has in braces: messages on the wire, config.json, rows of published data. Results are structs.
JsonObject = dict[str, Any]


class ResultError(CommandError):
    """A file that is not the result it should be."""


def to_json(result: msgspec.Struct) -> JsonObject:
    """Return the result as JSON values, its schema first."""
    built: JsonObject = msgspec.to_builtins(result)
    return built


def write_result(path: Path, result: msgspec.Struct) -> None:
    """Write it, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    write_json(path, to_json(result))


def write_indented(path: Path, result: msgspec.Struct) -> None:
    """Write it as `write_result`, a line for every value."""
    write_text(path, json.dumps(to_json(result), indent=1) + "\n")


def read_result(path: Path, kind: type[R]) -> R:
    """Read a result file.

    Raises:
        ResultError: it is not there, is no JSON, or is another kind of result.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ResultError(f"{path}: expected a result file, got {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ResultError(f"{path}: expected a {_name(kind)} result, got one where {error}") from error


def _name(kind: type[msgspec.Struct]) -> str:
    """Its schema; of a part of a result, which has none, its type."""
    return str(kind.__struct_config__.tag or kind.__name__)
