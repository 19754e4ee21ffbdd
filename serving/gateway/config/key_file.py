"""The file of keys that `laguna keys` writes and the gateway reads: [[keys]] in TOML, digests and limits."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence

from laguna_serve.serving.kit.results import JsonObject

HEADER = "# Written by `laguna keys`. After a change: kill -HUP of the gateway.\n"


def parse_toml(text: str) -> JsonObject:
    """Parse TOML. Raises ValueError: it is none, or Python cannot hold it (numbers of thousands of digits, nesting)."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("tables or lists that are nested too deeply") from None


def read_key_tables(text: str) -> list[JsonObject]:
    """Read the tables, not validated. Raises ValueError, without any of the text."""
    try:
        tables = parse_toml(text)
    except ValueError:
        raise ValueError("keys_file: expected TOML, got something else; make it with laguna keys new") from None
    found = tables.get("keys", [])
    if tables.keys() - {"keys"} or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError("keys_file: expected [[keys]] alone, got other tables; make it with laguna keys new")
    return found


def render_key_tables(tables: Sequence[JsonObject]) -> str:
    """Render tables of strings, numbers and lists of strings."""
    parts = [HEADER]
    for table in tables:
        # JSON's strings, numbers and lists are TOML's, as long as nothing is escaped in pairs.
        lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in table.items())
        parts.append("\n[[keys]]\n" + "".join(lines))
    return "".join(parts)
