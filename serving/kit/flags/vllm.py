"""vLLM's command line: whether a flag is given, and what for, in any of its spellings (underscores, `=`, `8k`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

WHOLE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)", re.IGNORECASE)


def names_flag(arguments: Sequence[str], *flags: str) -> bool:
    """Whether one of the flags is given."""
    return any(argument.partition("=")[0].replace("_", "-") in flags for argument in arguments)


def names_part(arguments: Sequence[str], flag: str) -> bool:
    """Whether the flag is given, or one field of it (`--reasoning-config.reasoning_end_str`)."""
    parts = (argument.replace("_", "-").startswith(flag + ".") for argument in arguments)
    return any(parts) or names_flag(arguments, flag)


def find_value(arguments: Sequence[str], flag: str) -> str | None:
    """Find the last value given for a flag, or None."""
    value = None
    for position, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if equals else next(iter(arguments[position + 1 : position + 2]), value)
    return value


def find_whole(arguments: Sequence[str], flag: str) -> int | None:
    """Find the last whole number given for a flag: 8192, 8k (8,000), 8K (8,192), 2.5g; None for what is none.

    Of that vLLM says what is wrong (`human_readable_int` of vLLM 0.32).
    """
    match = WHOLE.fullmatch((find_value(arguments, flag) or "").strip())
    if match is None:
        return None
    number, unit = match.groups()
    if not unit.islower():
        power = "KMGT".find(unit) + 1 if unit else 0
        return None if "." in number else int(number) << 10 * power
    return int(float(number) * 1000 ** ("kmgt".index(unit) + 1))
