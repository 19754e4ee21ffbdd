"""Typed access to what a config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laguna_serve.serving.kit.errors import CommandError


class CheckpointError(CommandError, ValueError):
    """A checkpoint that cannot be served, as one line."""


class Fields:
    """Typed access to one object of a config; a missing or mistyped field raises a CheckpointError that names it.

    ``defaults`` stand for keys that are not there.
    """

    def __init__(self, folder: Path, config: object, prefix: str = "", defaults: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.prefix = prefix
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder}: expected {prefix.rstrip('.')} in config.json, got none; fetch it again")
        self.config: dict[str, Any] = {**(defaults or {}), **{k: v for k, v in config.items() if v is not None}}

    def integer(self, key: str, default: int | None = None) -> int:
        """A field that is there, or has a default."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mismatch(key, "an integer", value)
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer from 1 on."""
        value = self.integer(key, default)
        if value < 1:
            raise self.mismatch(key, "a positive integer", value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list."""
        value = self.config.get(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.mismatch(key, "a list of integers", value)
        return tuple(value)

    def mismatch(self, key: str, expected: str, got: object) -> CheckpointError:
        """The error that names a field."""
        what = "nothing" if got is None else repr(got)
        return CheckpointError(
            f"{self.folder}: expected {self.prefix}{key} to be {expected}, got {what}; fetch it again"
        )
