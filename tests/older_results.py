"""Results that were written before their types had all of today's fields."""

from __future__ import annotations

from typing import Any


def fill_defaults(old: Any, new: Any) -> Any:
    """The old content with what only newer files have: keys whose default was added by reading."""
    if isinstance(old, dict) and isinstance(new, dict):
        added = {key: value for key, value in new.items() if key not in old}
        assert all(value in (None, [], {}, 0, 0.0, "") for value in added.values()), added
        return {key: fill_defaults(value, new.get(key)) for key, value in old.items()} | added
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [fill_defaults(*pair) for pair in zip(old, new, strict=True)]
    return old
