"""Typed access to what a config.json says."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import JsonObject

# Of a value that is not as expected, as much as a line has room for.
MAX_SHOWN = 120
# Sizes of layers and of vocabularies are far below; a number above it is a mistake, and would be computed with.
MAX_INTEGER, MAX_LAYERS = 1 << 40, 10_000


# A config.json as it was read: any JSON object, passed on to vLLM or written again with all of its keys.
ConfigJson = JsonObject


class CheckpointError(CommandError, ValueError):
    """A checkpoint that cannot be served, as one line."""


def show(value: object) -> str:
    """Show a value of a file for a message: one line in ASCII, its middle left out where it is long."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 20]} … {text[-17:]}"


class Fields:
    """Typed access to one object of a config; a missing or mistyped field raises a CheckpointError that names it.

    `defaults` stand for keys that are not there.
    """

    def __init__(self, folder: Path, config: object, prefix: str = "", defaults: ConfigJson | None = None) -> None:
        self.folder = folder
        self.prefix = prefix
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder}: expected {prefix.rstrip('.')} in config.json, got none; fetch it again")
        self.config: ConfigJson = {**(defaults or {}), **{k: v for k, v in config.items() if v is not None}}

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a field that is there, or has a default."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mismatch(key, "an integer", value)
        if value > MAX_INTEGER:
            raise self.mismatch(key, f"at most {MAX_INTEGER}", value)
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """Return an integer, at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise self.mismatch(key, "a positive integer", value)
        return value

    def layers(self) -> int:
        """num_hidden_layers: from 1 to MAX_LAYERS."""
        count = self.positive("num_hidden_layers")
        if count > MAX_LAYERS:
            raise self.mismatch("num_hidden_layers", f"at most {MAX_LAYERS}", count)
        return count

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers, empty or not."""
        value = self.config.get(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.mismatch(key, "a list of integers", value)
        return tuple(value)

    def name(self, key: str) -> str | None:
        """Return a text, where it is there."""
        value = self.config.get(key)
        if not (value is None or (isinstance(value, str) and value.isprintable())):
            raise self.mismatch(key, "a name", value)
        return value

    def kinds(self, key: str, count: int, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return a word of `allowed` for each of `count` layers; None where the key is not there."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(word not in allowed for word in value):
            words = " and ".join(map(repr, allowed))
            raise self.mismatch(key, f"{count} of {words}", value)
        return tuple(value)

    def mismatch(self, key: str, expected: str, got: object) -> CheckpointError:
        """Return the error that names a field."""
        what = "nothing" if got is None else show(got)
        return CheckpointError(
            f"{self.folder}: expected {self.prefix}{key} to be {expected}, got {what}; fetch it again"
        )
