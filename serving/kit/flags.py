"""A command line from a command's configuration: a frozen, keyword-only dataclass whose fields tell their flags.

    @dataclass(frozen=True, kw_only=True)
    class LossConfig:
        prompts: Annotated[Path, Flag("JSONL, one prompt per line", metavar="FILE")]
        max_tokens: Annotated[int, Flag("output tokens per prompt", metavar="N", at_least=1)] = 128

    config = read_flags(LossConfig, argv, prog="evals/loss.py", description=__doc__, epilog=EXAMPLES)

A Python caller makes the same object by hand. What is checked is checked in the object: `check_bounds(self)` in
`__post_init__`, and whatever holds between fields, raise FlagError there.

| a field's type | its flag |
|--|--|
| int, float, str, Path, or X \\| None | takes one value |
| Literal["a", "b"] | one of these |
| bool, default False | `--name` |
| bool, default True | `--no-name` |
| tuple[int, ...] and others | values separated by commas (`several`: by blanks; `repeated`: one each time) |

Ours, on argparse: builders that derive a command line from types (tyro, cyclopts, pydantic-settings) bring an own form
of help and of errors; here both are published, one line each, and tested.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from laguna_serve.serving.kit.cli import Parser, add_json_flag
from laguna_serve.serving.kit.errors import CommandError


class FlagError(CommandError):
    """A value, or a combination of them, that a configuration cannot have."""


@dataclass(frozen=True)
class Flag:
    """What a field's flag is besides its name and type.

    Attributes:
        help: what `--help` says.
        metavar: the value's name there.
        at_least: the smallest value (of each element), for `check_bounds`.
        parse: text → value, where the type alone does not say how; raises ValueError or argparse.ArgumentTypeError.
        name: the flag, where it is not the field's name.
        old: former names, which work for one release with a warning.
        old_switches: former switches (without a value) and the value that each stands for, likewise.
        group: its heading in `--help`; fields that follow stay under it.
        positional: given by place, not by name.
        repeated: of a tuple: given once for each value.
        several: of a tuple: values separated by blanks, as folders and names, which may have commas in them.
        either_way: of a bool: `--name` and `--no-name`.
    """

    help: str = ""
    metavar: str | None = None
    at_least: float | None = None
    parse: Callable[[str], Any] | None = None
    name: str | None = None
    old: tuple[str, ...] = ()
    old_switches: tuple[tuple[str, Any], ...] = ()
    group: str | None = None
    positional: bool = False
    repeated: bool = False
    several: bool = False
    either_way: bool = False


@dataclass(frozen=True)
class Quick:
    """What `--quick` gives to fields that were not given; a configuration's class attribute `QUICK`.

    Attributes:
        help: in words ("16 prompts × 64 tokens").
        values: field → value.
    """

    help: str
    values: Mapping[str, Any]


class Config(Protocol):
    """A configuration: any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


C = TypeVar("C", bound=Config)


def read_flags(
    config: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    epilog: str | None = None,
) -> C:
    """The command line as a configuration. Exits with status 2 and one line on a bad one, 0 after `--help`."""
    parser = Parser(prog=prog, description=description, epilog=epilog)
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
    """As read_flags, for a command that ends in `print_result`: the configuration, and whether `--json` was given."""
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
        flag = _flag_of(hints[field.name])
        if flag is None:
            continue
        if flag.group is not None:
            target = parser.add_argument_group(flag.group)
        _add_flag(target, field, hints[field.name], flag)
    if (quick := _quick_of(config)) is not None:
        target.add_argument("--quick", action="store_true", help=f"{quick.help}, unless given")


def make_config(parser: argparse.ArgumentParser, config: type[C], given: argparse.Namespace) -> C:
    """The configuration from a command line that `add_flags` described; what it cannot be ends in `parser.error`."""
    hints = get_type_hints(config, include_extras=True)
    quick = _quick_of(config) if getattr(given, "quick", False) else None
    values = {**(quick.values if quick else {}), **vars(given)}
    missing = [field for field in fields(config) if _is_required(field) and field.name not in values]
    if missing:
        parser.error(
            f"the following arguments are required: {', '.join(_subject(f.name, hints[f.name]) for f in missing)}"
        )
    try:
        return config(**{field.name: _frozen(values[field.name]) for field in fields(config) if field.name in values})
    except FlagError as error:
        parser.error(str(error))


def check_bounds(config: Config) -> None:
    """Refuse what is under its `at_least`, and text that is none of its choices.

    Raises:
        FlagError: naming the flag.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        flag, value = _flag_of(hint), getattr(config, name, None)
        if flag is None or value is None:
            continue
        subject = _subject(name, hint)
        for part in value if isinstance(value, tuple) else (value,):
            if flag.at_least is not None and not part >= flag.at_least:
                raise FlagError(f"{subject}: expected at least {_show(flag.at_least)}, got {part}")
            choices = _choices(_element(hint))
            if choices is not None and part not in choices:
                raise FlagError(f"{subject}: expected one of {', '.join(map(str, choices))}, got {part}")


def _add_flag(target: argparse._ActionsContainer, field: Field[Any], hint: Any, flag: Flag) -> None:
    required = _is_required(field)
    settings: dict[str, Any] = {"help": flag.help or None}
    kind = _element(hint)
    if flag.either_way:
        settings["action"] = argparse.BooleanOptionalAction
    elif kind is bool:
        settings["action"] = "store_false" if field.default is True else "store_true"
    else:
        settings["metavar"] = flag.metavar
        listed = _is_list(hint) and not flag.repeated and not flag.several
        settings["choices"] = None if flag.parse or listed else _choices(kind)
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
    option = flag.name or _option(field.name, negated=negated)
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


def _quick_of(config: type[Config]) -> Quick | None:
    return getattr(config, "QUICK", None)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _subject(name: str, hint: Any) -> str:
    """What a field is called on the command line."""
    flag = _flag_of(hint)
    assert flag is not None
    return flag.metavar or name if flag.positional else flag.name or _option(name)


def _flag_of(hint: Any) -> Flag | None:
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Flag)), None) if _annotated(hint) else None


def _annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _bare(hint: Any) -> Any:
    """The type without Annotated and without None."""
    if _annotated(hint):
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else hint
    return hint


def _is_list(hint: Any) -> bool:
    return get_origin(_bare(hint)) is tuple


def _element(hint: Any) -> Any:
    bare = _bare(hint)
    return get_args(bare)[0] if _is_list(hint) else bare


def _choices(kind: Any) -> tuple[Any, ...] | None:
    return get_args(kind) if get_origin(kind) is Literal else None


def _scalar(kind: Any) -> Callable[[str], Any]:
    if (choices := _choices(kind)) is not None:
        return type(choices[0])
    if kind in (int, float, str, Path):
        return kind  # type: ignore[no-any-return]
    raise TypeError(f"{kind}: expected int, float, str, Path or Literal, or a Flag with `parse`")


def _list_of(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    scalar = _scalar(kind)

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(scalar(part.strip()) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected values separated by commas, got {text!r}") from None

    return parse


def _option(name: str, *, negated: bool = False) -> str:
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"


def _show(value: float) -> str:
    return f"{value:g}"
