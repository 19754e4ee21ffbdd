"""What a configuration's fields tell of their flags, and the checks that hold for both ways of making one."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from laguna_serve.serving.kit.errors import CommandError

# Threads of the processor: beyond some tens of thousands, libgomp and torch end in a signal.
MOST_THREADS = 1024
# NumPy's generators of old, which vLLM seeds, take no more, and no generator a negative one.
MOST_SEED = (1 << 32) - 1
# Of a whole number that says no other bound: what is beyond it is a slip, for which lists, queues or weeks are needed.
MOST_COUNT = 10_000_000
# Of a text that is read.
MOST_TEXT = 10**12
# Of a whole number that something else bounds, as memory does, or nothing need.
ANY = math.inf
# As many connections one address takes: an address has 65,535 ports.
MOST_TOGETHER = (1 << 16) - 1
MOST_OF = {
    **dict.fromkeys(("concurrency", "streams", "clients"), MOST_TOGETHER),
    **dict.fromkeys(("rounds", "repeats", "sessions"), 100_000),
}


class FlagError(CommandError):
    """A value, or a combination of them, that a configuration cannot have."""


@dataclass(frozen=True)
class Flag:
    """What a field's flag is besides its name and type.

    Attributes:
        help: what `--help` says.
        metavar: the value's name there.
        at_least, at_most: the smallest and the largest value (of each element), for `check_bounds`.
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
    at_most: float | None = None
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


def check_bounds(config: Config) -> None:
    """Refuse what is under its `at_least` or over its `at_most`, and text that is none of its choices.

    Whole numbers whose flag says no `at_most` have MOST_OF's, or MOST_COUNT.

    Raises:
        FlagError: naming the flag.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        flag, value = find_flag(hint), getattr(config, name, None)
        if flag is None or value is None:
            continue
        subject = name_subject(name, hint)
        for part in value if isinstance(value, tuple) else (value,):
            if flag.at_least is not None and not part >= flag.at_least:
                raise FlagError(f"{subject}: expected at least {_show(flag.at_least)}, got {part}")
            most = _find_most(name, flag, part)
            if most is not None and not part <= most:
                raise FlagError(f"{subject}: expected at most {_show(most)}, got {part}")
            choices = list_choices(find_element(hint))
            if choices is not None and part not in choices:
                raise FlagError(f"{subject}: expected one of {', '.join(map(str, choices))}, got {part}")


@dataclass(frozen=True, kw_only=True)
class BoundedConfig:
    """A configuration that refuses values outside of their flags' bounds as it is made."""

    def __post_init__(self) -> None:
        """Raise FlagError as `check_bounds` does."""
        check_bounds(self)


def _find_most(name: str, flag: Flag, value: object) -> float | None:
    """Find the largest value of a field: its flag's, or that of any whole number."""
    if flag.at_most is not None or type(value) is not int:
        return flag.at_most
    return MOST_OF.get(name, MOST_COUNT)


def find_quick(config: type[Config]) -> Quick | None:
    """Find what `--quick` gives; None where a configuration has no such flag."""
    return getattr(config, "QUICK", None)


def is_required(field: Field[Any]) -> bool:
    """Say whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def name_subject(name: str, hint: Any) -> str:
    """Say what a field is called on the command line."""
    flag = find_flag(hint)
    assert flag is not None
    return flag.metavar or name if flag.positional else flag.name or name_option(name)


def find_flag(hint: Any) -> Flag | None:
    """Find the Flag in a field's annotation; a field without one is not on the command line."""
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Flag)), None) if _annotated(hint) else None


def _annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _bare(hint: Any) -> Any:
    """Strip a type of Annotated and of None."""
    if _annotated(hint):
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else hint
    return hint


def is_list(hint: Any) -> bool:
    """Say whether a field takes several values."""
    return get_origin(_bare(hint)) is tuple


def find_element(hint: Any) -> Any:
    """Find the type of one value."""
    bare = _bare(hint)
    return get_args(bare)[0] if is_list(hint) else bare


def list_choices(kind: Any) -> tuple[Any, ...] | None:
    """List the values of a Literal; None for other types."""
    return get_args(kind) if get_origin(kind) is Literal else None


def name_option(name: str, *, negated: bool = False) -> str:
    """Turn a field's name into its option."""
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"


def _show(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
