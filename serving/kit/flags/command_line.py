"""Flags added to an argument parser, and the configuration made of what it parsed."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from laguna_serve.serving.kit.cli import Parser, add_json_flag
from laguna_serve.serving.kit.files import is_whole
from laguna_serve.serving.kit.flags.declaration import (
    Config,
    Flag,
    FlagError,
    check_bounds,
    find_element,
    find_flag,
    find_quick,
    is_list,
    is_required,
    list_choices,
    name_option,
    name_subject,
)

C = TypeVar("C", bound=Config)


def read_flags(
    config: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    epilog: str | None = None,
    elsewhere: str | None = None,
) -> C:
    """Read the command line as a configuration. Exits with status 2 and one line on a bad one, 0 after `--help`.

    `elsewhere` is Parser's.
    """
    parser = Parser(prog=prog, description=description, epilog=epilog, elsewhere=elsewhere)
    add_flags(parser, config)
    return make_config(parser, config, parser.parse_args(argv))


def read_flags_and_json(
    config: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    epilog: str | None = None,
) -> tuple[C, bool]:
    """Read flags of a command that ends in `print_result`: the configuration, and whether `--json` was given."""
    parser = Parser(prog=prog, description=description, epilog=epilog)
    add_flags(parser, config)
    add_json_flag(parser)
    given = parser.parse_args(argv)
    return make_config(parser, config, given), bool(given.json)


def add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Add a flag for each field that has a Flag, and `--quick` where the configuration has such values."""
    hints = get_type_hints(config, include_extras=True)
    target: argparse._ActionsContainer = parser
    for field in fields(config):
        flag = find_flag(hints[field.name])
        if flag is None:
            continue
        if flag.group is not None:
            target = parser.add_argument_group(flag.group)
        _add_flag(target, field, hints[field.name], flag)
    if (quick := find_quick(config)) is not None:
        target.add_argument("--quick", action="store_true", help=f"{quick.help}, unless given")


def make_config(parser: argparse.ArgumentParser, config: type[C], given: argparse.Namespace) -> C:
    """Make the configuration from a command line that `add_flags` described.

    What it cannot be ends in `parser.error`.
    """
    hints = get_type_hints(config, include_extras=True)
    quick = find_quick(config) if getattr(given, "quick", False) else None
    values = {**(quick.values if quick else {}), **vars(given)}
    missing = [field for field in fields(config) if is_required(field) and field.name not in values]
    if missing:
        parser.error(
            f"the following arguments are required: {', '.join(name_subject(f.name, hints[f.name]) for f in missing)}"
        )
    try:
        made = config(**{field.name: _frozen(values[field.name]) for field in fields(config) if field.name in values})
        check_bounds(made)  # of those that have no checks of their own, too
        return made
    except FlagError as error:
        parser.error(str(error))


def _add_flag(target: argparse._ActionsContainer, field: Field[Any], hint: Any, flag: Flag) -> None:
    required = is_required(field)
    settings: dict[str, Any] = {"help": _describe(flag, field) or None}
    kind = find_element(hint)
    if flag.either_way:
        settings["action"] = argparse.BooleanOptionalAction
    elif kind is bool:
        settings["action"] = "store_false" if field.default is True else "store_true"
    else:
        settings["metavar"] = flag.metavar
        listed = is_list(hint) and not flag.repeated and not flag.several
        settings["choices"] = None if flag.parse or listed else list_choices(kind)
        settings["type"] = flag.parse or (_list_of(kind) if listed else _scalar(kind))
        if flag.repeated and not flag.positional:
            settings["action"] = "append"
        if flag.several:
            settings["nargs"] = "+"
    if flag.positional:
        nargs = ("+" if required else "*") if flag.repeated else (None if required else "?")
        target.add_argument(field.name, nargs=nargs, default=argparse.SUPPRESS, **settings)
        return
    negated = kind is bool and field.default is True and not flag.either_way
    option = flag.name or name_option(field.name, negated=negated)
    # What was not given is not in the namespace: the dataclass has the defaults, and make_config misses the required.
    required = required and not flag.old and not flag.old_switches
    target.add_argument(option, dest=field.name, required=required, default=argparse.SUPPRESS, **settings)
    for old in flag.old:
        renamed = {**settings, "action": _Renamed, "help": argparse.SUPPRESS, "new": option}
        if kind is bool:
            renamed |= {"nargs": 0, "const": field.default is not True}
        target.add_argument(old, dest=field.name, default=argparse.SUPPRESS, **renamed)
    for switch, value in flag.old_switches:
        target.add_argument(
            switch,
            dest=field.name,
            action=_Renamed,
            nargs=0,
            const=value,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            new=f"{option} {value}",
        )


def _describe(flag: Flag, field: Field[Any]) -> str:
    """Say what a flag is, and the number or text that stands for it where it is left out, if its help does not."""
    default = field.default
    if isinstance(default, bool) or not isinstance(default, int | float | str) or default == "":
        return flag.help
    if "default" in flag.help or f"({default})" in flag.help:
        return flag.help
    return f"{flag.help} (default: {default})" if flag.help else f"default: {default}"


class _Renamed(argparse.Action):
    """A former name: works, and says what the name is now."""

    def __init__(self, *args: Any, new: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        message = f"{option} is now {self.new}; the old name goes with the next release"
        print(f"{parser.prog}: warning: {message}", file=sys.stderr)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def _frozen(value: Any) -> Any:
    """Values of a repeated flag come as a list."""
    return tuple(value) if isinstance(value, list) else value


def _scalar(kind: Any) -> Callable[[str], Any]:
    if (choices := list_choices(kind)) is not None:
        return type(choices[0])
    if kind is float:
        return _read_finite
    if kind is Path:
        return _read_path
    if kind is str:
        return _read_text
    if kind is int:
        return int
    raise TypeError(f"{kind}: expected int, float, str, Path or Literal, or a Flag with `parse`")


def _read_path(text: str) -> Path:
    """Read a path; nothing, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(_read_text(text))


def _read_text(text: str) -> str:
    """Read a text; bytes that are no UTF-8 could be written to no result."""
    if not is_whole(text):
        raise argparse.ArgumentTypeError(f"expected UTF-8, got {text.encode(errors='surrogateescape')!r}")
    return text


def _read_finite(text: str) -> float:
    """Read a number; none means anything that is infinite, or not a number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _list_of(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    scalar = _scalar(kind)

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(scalar(part.strip()) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected values separated by commas, got {text!r}") from None

    return parse


def parse_words(text: str) -> tuple[str, ...]:
    """Read flags as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected flags as in a shell, got {str(error).lower()}") from None


def parse_numbers(text: str) -> tuple[int, ...]:
    """Positive integers separated by commas, each once, rising."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive numbers like 1,3,7, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))
