"""What is wrong with a configuration, in words: every fault with its dotted key, what was expected and what was given.

Values that are secret, or may be (a key pasted where its digest belongs), are never shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# Of these the value is never shown: it may be the secret itself, pasted into the wrong place.
SECRET = frozenset(("sha256", "api_key_file", "api_key_env"))
# Fields whose value is shown where it is refused; what else came (a table, a list) is named by its type alone.
SHOWN_TYPES = (str, int, float)
MAX_SHOWN = 80
MAX_FAULTS = 20
TYPES: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of a sensible size",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
}
KIND = re.compile(r"(?:constrained-)?(?:int|float|str|bool)|literal\[.*\]")
EXAMPLE = "see laguna gateway --example"


class ConfigError(ValueError):
    """A configuration that cannot be used; one line naming file, keys and what was expected."""


def describe(error: ValidationError, root: type[BaseModel], source: str, example: str = EXAMPLE) -> str:
    """One line for all that is wrong with a configuration of the type `root` that was read from `source`."""
    found = error.errors(include_url=False)
    # A list whose elements are refused is too short by them, too.
    found = [f for f in found if f["type"] != "too_short" or not any(_is_within(g["loc"], f["loc"]) for g in found)]
    said: dict[str, list[str]] = {}
    for fault in found:
        said.setdefault(format_key(_drop_kind(fault)), []).append(_describe_fault(fault, root))
    faults = [f"{key}: {_join(messages)}" for key, messages in said.items()]
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], f"and {len(faults) - MAX_FAULTS} more"]
    return f"{source}: {'; '.join(faults)}; {example}"


def format_key(loc: Sequence[int | str]) -> str:
    """Format the dotted key, parts that are no bare TOML keys quoted."""
    parts = [part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else repr(part)[:MAX_SHOWN] for part in map(str, loc)]
    return ".".join(parts) or "the file"


def redact_url(url: str) -> str:
    """Redact what may be secret in a URL: user and password, query."""
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _is_within(loc: Sequence[int | str], outer: Sequence[int | str]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


def _drop_kind(fault: ErrorDetails) -> Sequence[int | str]:
    """Drop what pydantic puts behind a key that may have values of several kinds: which of them was tried."""
    *above, last = fault["loc"] or ("",)
    tried = fault["type"] != "extra_forbidden" and KIND.fullmatch(str(last)) is not None
    return above if tried else fault["loc"]


def _join(messages: Sequence[str]) -> str:
    """Join what was expected of one value, of every kind that it may have."""
    expected = [message.removeprefix("expected ").rpartition(", got ")[0] for message in messages]
    if len(messages) == 1 or not all(expected):
        return "; ".join(messages)
    return f"expected {', or '.join(expected)}, got {messages[-1].rpartition(', got ')[2]}"


def _describe_fault(fault: ErrorDetails, root: type[BaseModel]) -> str:
    kind, loc = fault["type"], fault["loc"]
    if kind == "extra_forbidden":
        return "expected no such key" + _suggest(loc, root)
    if kind == "missing":
        return "expected a value, got none"
    if kind in TYPES:
        bounds = {name: _round(value) for name, value in fault.get("ctx", {}).items()}
        message = "expected " + TYPES[kind].format(**bounds)
    else:
        message = fault["msg"].removeprefix("Value error, ")
    if ", got " in message:
        return message
    return f"{message}, got {_show(loc, fault['input'])}"


def _show(loc: Sequence[int | str], value: Any) -> str:
    """Show the value that was given, where it may be seen."""
    names = [part for part in loc if isinstance(part, str)]
    name = names[-1] if names else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if name in SECRET:
        return "something else (not shown)"
    # An element of a list of tables is no value of a key: [[keys]] written as keys = ["sk-…"].
    if not isinstance(value, SHOWN_TYPES) or name in ("", "keys", "admin", "models", "upstreams", "shadows"):
        return _name_type(value)
    shown = repr(redact_url(value) if isinstance(value, str) else value)
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"


def _round(bound: Any) -> Any:
    """Round a bound as people write it: 86,400, not 86400.0."""
    return f"{int(bound):,}" if isinstance(bound, int | float) and bound == int(bound) else bound


def _name_type(value: Any) -> str:
    names = ((Mapping, "a table"), (str, "a string"), (Sequence, "a list"), (int, "an integer"), (float, "a number"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _suggest(loc: Sequence[int | str], root: type[BaseModel]) -> str:
    """Suggest the key that was probably meant: the nearest one of the same table, or the table that has it."""
    *above, name = loc
    table = root
    for part in above:
        if isinstance(part, str):
            found = _find_table(table, part)
            if found is None:
                return ""
            table = found
    if nearest := difflib.get_close_matches(str(name), table.model_fields, 2):
        return f"; did you mean {' or '.join(nearest)}?"
    owners = [path or "the top of the file" for path, other in _walk(root, "") if name in other.model_fields]
    return f"; it belongs in {' or '.join(owners)}" if owners else ""


def _find_table(table: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = table.model_fields.get(name)
    return None if field is None else _unwrap(field.annotation)


def _unwrap(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for part in get_args(annotation) if (table := _unwrap(part)) is not None), None)


def _walk(table: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table of a configuration with its dotted key."""
    yield path, table
    for name in table.model_fields:
        if (inner := _find_table(table, name)) is not None:
            yield from _walk(inner, f"{path}.{name}" if path else name)
