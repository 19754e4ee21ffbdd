"""`laguna keys`: makes, lists and revokes the keys of a gateway's file."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from laguna_serve.serving.kit.cli import Parser, choose_command
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, check_bounds
from laguna_serve.serving.kit.tables import Table

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.config.keys import Key

PREFIX = "sk-laguna-"
SECRET_BYTES = 32
# Names in an error; of more than SHOWN it has NEAREST.
SHOWN, NEAREST = 20, 3
NEW = """Makes a key, puts its SHA-256 into the file, and prints the key itself this one time.

The file is written whole or not at all. A gateway whose access.keys_file it is takes it at SIGHUP."""
NEW_EXAMPLES = """examples:
  laguna keys new agents --file keys.toml --tokens-per-minute 200000 --tokens-per-day 10000000
  laguna keys new batch --file keys.toml --models small,large --priority 10
"""
LIST_EXAMPLES = """examples:
  laguna keys list --file keys.toml
"""
REVOKE_EXAMPLES = """examples:
  laguna keys revoke agents --file keys.toml && kill -HUP "$GATEWAY"    (the process that laguna gateway prints)
"""
File = Annotated[Path, Flag("of the keys: access.keys_file of gateway.toml", metavar="FILE")]
Named = Annotated[str, Flag("of the key, in logs, metrics and usage", positional=True, metavar="NAME")]
# Of tokens in a day; a 64-bit counter takes more.
MOST_LIMIT = 1 << 53
Limit = Annotated[int | None, Flag("at most so many; without it no limit", metavar="N", at_least=1, at_most=MOST_LIMIT)]


class KeysError(CommandError, ValueError):
    """A file of keys that cannot be read, or a key that it has already or has not."""


@dataclass(frozen=True, kw_only=True)
class NewKeyConfig:
    """A key and its limits."""

    name: Named
    file: File
    models: Annotated[tuple[str, ...], Flag("that it may ask for; without it all", metavar="A,B")] = ()
    max_in_flight: Limit = None
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None
    priority: Annotated[int, Flag("the smaller the sooner, as in vLLM", metavar="N")] = 0

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class ListKeysConfig:
    """Which keys to list."""

    file: File


@dataclass(frozen=True, kw_only=True)
class RevokeKeyConfig:
    """A key that is to go."""

    name: Named
    file: File


class KeysResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.keys/1"):
    """What became of the file, the names of the keys in it, and the key that was made, which is nowhere else."""

    outcome: Literal["made", "listed", "revoked"]
    names: tuple[str, ...]
    key: str | UnsetType = UNSET


def main(argv: Sequence[str] | None = None) -> int:
    """`laguna keys`: one tool of several. Returns the exit status."""
    parser = Parser(prog="laguna keys", description="Keys of a gateway's clients, with their limits.")
    tools = {
        "new": "make a key, and print it this one time",
        "list": "show names and limits",
        "revoke": "take a key out",
    }
    tool, rest = choose_command(parser, tools, argv)
    if tool == "new":
        return Command("laguna keys new", NewKeyConfig, NEW, NEW_EXAMPLES).run(rest, make_key)
    if tool == "revoke":
        text = "Takes a key out of the file; a gateway that runs goes on with it until it gets a SIGHUP."
        return Command("laguna keys revoke", RevokeKeyConfig, text, REVOKE_EXAMPLES).run(rest, revoke_key)
    keys: list[Key] = []

    def act(config: ListKeysConfig) -> KeysResult:
        keys[:] = read_file(config.file)
        return KeysResult(outcome="listed", names=tuple(key.name for key in keys))

    command = Command("laguna keys list", ListKeysConfig, "Shows the keys of a file and their limits.", LIST_EXAMPLES)
    return command.run(rest, act, show=lambda _: render_keys(keys))


def make_key(config: NewKeyConfig) -> KeysResult:
    """Make a key and add it to the file, which is made if it is not there.

    Raises:
        KeysError: the file has one of this name, is none of keys, or has no folder; the name or a model is none.
        OSError: it cannot be written.
    """
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    table: dict[str, object] = {"name": config.name, "sha256": hashlib.sha256(secret.encode()).hexdigest()}
    limits = ("max_in_flight", "requests_per_minute", "tokens_per_minute", "tokens_per_day")
    table |= {name: value for name in limits if (value := getattr(config, name)) is not None}
    table |= {"models": list(config.models)} if config.models else {}
    table |= {"priority": config.priority} if config.priority else {}

    def add(keys: list[Key]) -> list[Key]:
        if any(key.name == config.name for key in keys):
            raise KeysError(f"NAME: expected one that {config.file} has not, got {config.name}; revoke it first")
        return [*keys, check_key(table)]

    names = change_file(config.file, add)
    return KeysResult(outcome="made", names=names, key=secret)


def revoke_key(config: RevokeKeyConfig) -> KeysResult:
    """Take a key out of the file. Raises KeysError: it has none of this name; OSError."""

    def remove(keys: list[Key]) -> list[Key]:
        left = [key for key in keys if key.name != config.name]
        if len(left) == len(keys):
            known = _tell_names([key.name for key in keys], config.name)
            raise KeysError(f"NAME: expected a key of {config.file} ({known}), got {config.name}")
        return left

    return KeysResult(outcome="revoked", names=change_file(config.file, remove))


def change_file(path: Path, change: Callable[[list[Key]], list[Key]]) -> tuple[str, ...]:
    """Change the keys of a file, one process after the other; the names that it has then."""
    from laguna_serve.serving.gateway.config.key_file import render_key_tables

    target = Path(os.path.realpath(path))  # of a link, which stays one, and has no lock of its own
    with _lock(target):
        keys = change(read_file(path) if path.exists() else [])
        write_text(target, render_key_tables([key.model_dump(mode="json", exclude_defaults=True) for key in keys]))
    return tuple(key.name for key in keys)


def read_file(path: Path) -> list[Key]:
    """Read the keys of a file. Raises KeysError."""
    from laguna_serve.serving.gateway.config.keys import read_keys

    try:
        return list(read_keys(str(path)))
    except ValueError as error:
        raise KeysError(f"--file {path}: {error}") from None


def check_key(table: dict[str, object]) -> Key:
    """Check a key's table as the gateway does. Raises KeysError."""
    from pydantic import ValidationError

    from laguna_serve.serving.gateway.config.keys import Key

    try:
        return Key.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise KeysError(f"{where}: {message}") from None


def render_keys(keys: Sequence[Key]) -> str:
    """Render a table of the keys; digests are not in it."""
    heads = ("key", "models", "in flight", "requests/min", "tokens/min", "tokens/day", "priority")
    rows = []
    for key in keys:
        limits = (key.max_in_flight, key.requests_per_minute, key.tokens_per_minute, key.tokens_per_day)
        shown = ("–" if limit is None else f"{limit:,}" for limit in limits)
        rows.append((key.name, ", ".join(key.models) or "all", *shown, str(key.priority)))
    return Table("llrrrrr", heads, rows).to_text()


def _tell_names(names: list[str], wanted: str) -> str:
    """Tell all names, or of many those that are most like the wanted one."""
    if len(names) <= SHOWN:
        return ", ".join(names) or "none at all"
    nearest = difflib.get_close_matches(wanted, names, NEAREST) or names[:NEAREST]
    return f"{', '.join(nearest)} and {len(names) - len(nearest):,} more: see laguna keys list"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep others from changing the file meanwhile; the lock is a file beside it, as the file itself is replaced.

    Raises:
        KeysError: there is no folder for it, or one that is closed.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        got = "one that is closed" if path.parent.is_dir() else "none"
        raise KeysError(f"--file {path}: expected a folder to write to, got {got}; make it, or name another file")
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
