"""What kind of value an answer is, for a test that takes one type for another: its family, its length, its numbers."""

from __future__ import annotations

import array
import collections
import decimal
import fractions
import types
from collections.abc import Iterator
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import ITEMS, KEYS, VALUES, is_finite
from laguna_serve.evals.sandbox.messages.proxies import Remote

# How far into an answer is looked.
MAX_LOOKED = 100_000
RAISED, NOTHING, TRUTH, NUMBER, TEXT, BYTES, MAPPING, MANY = (
    *("raised", "None", "truth value", "number", "text", "bytes", "mapping", "collection"),
)
FUNCTION, OBJECT, CALLABLE = "function", "object", "callable object"
MAPPINGS = (dict, collections.ChainMap, collections.UserDict, types.MappingProxyType)
COLLECTIONS = (
    collections.UserList,
    list,
    tuple,
    set,
    frozenset,
    range,
    collections.deque,
    array.array,
    KEYS,
    VALUES,
    ITEMS,
)
NUMBERS = (int, float, complex, decimal.Decimal, fractions.Fraction)
# Where a test takes one for the other: a match or None for a truth value, a truth value for a number.
ALIKE = ({NOTHING, TRUTH, OBJECT}, {TRUTH, NUMBER}, {CALLABLE, FUNCTION}, {CALLABLE, OBJECT})
Kind = list[Any]


def find_family(value: Any) -> str:
    """Find the family of a value: within one, a test may take one type for another."""
    if isinstance(value, Remote):
        kind = type(value)
        if hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
            return MANY
        shown: Any = value  # a proxy of a function says that it is one
        if isinstance(shown, types.FunctionType):
            return FUNCTION
        return CALLABLE if callable(value) else OBJECT
    if value is None:
        return NOTHING
    for family, kinds in (
        (TRUTH, bool),
        (NUMBER, NUMBERS),
        (TEXT, (str, collections.UserString)),
        (MAPPING, MAPPINGS),
        (MANY, COLLECTIONS),
    ):
        if isinstance(value, kinds):
            return family
    if isinstance(value, bytes | bytearray | memoryview):
        return BYTES
    if type(value).__module__ == "numpy":
        if getattr(value, "ndim", None):
            return MANY
        return TRUTH if value.dtype.kind == "b" else TEXT if value.dtype.kind in "US" else NUMBER
    return type(value).__name__


def describe_kind(value: Any, changed: bool) -> Kind:
    """[family, length or None, number of distinct items or None, all numbers finite, arguments changed]."""
    family, length, distinct = find_family(value), None, None
    if family in (MANY, MAPPING) and not isinstance(value, Remote):
        length = len(value)
        try:
            distinct = len(set(value))
        except TypeError:
            distinct = None
    elif family in (TEXT, BYTES):
        length = min(len(value), 1)
    return [family, length, distinct, all(map(is_finite, look_into(value))), changed]


def look_into(value: Any) -> Iterator[Any]:
    """Yield what a value consists of, to a bounded extent."""
    waiting, seen = [value], 0
    while waiting and seen < MAX_LOOKED:
        part = waiting.pop()
        seen += 1
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset | collections.deque):
            waiting += part
        elif type(part).__module__ == "numpy" and hasattr(part, "tolist"):
            numbers = part.ravel()[:MAX_LOOKED].tolist() if part.dtype.kind in "fc" else []
            waiting += numbers
        else:
            yield part


def is_compatible(kind: Kind, expected: Kind, open_ended: bool) -> bool:
    """Whether an answer of this kind may stand where the canonical solution gives one of the other."""
    family, length, distinct, finite, _ = kind
    wanted, wanted_length, wanted_distinct, wanted_finite, _ = expected
    if family != wanted:
        return any({family, wanted} <= alike for alike in ALIKE)
    if wanted_finite and not finite:
        return False
    if length is None or wanted_length is None or length == wanted_length:
        return True
    if bool(length) != bool(wanted_length):
        return False
    return open_ended or (distinct is not None and distinct == wanted_distinct)


def show_kind(kind: Kind) -> str:
    """Show the kind in words, as "a list of 3"."""
    family, length, _, finite, _ = kind
    said = f"a {family}" if family not in (RAISED, NOTHING) else {RAISED: "an exception", NOTHING: "None"}[family]
    if family in (MANY, MAPPING) and length is not None:
        said += f" of {length}"
    elif family in (TEXT, BYTES) and not length:
        said = f"no {family}"
    return said if finite else said + " that is not finite"


def has_nan(value: Any) -> bool:
    """Say whether one of its numbers is NaN."""
    for part in look_into(value):
        try:
            if isinstance(part, float | complex | decimal.Decimal) and part != part:
                return True
        except decimal.DecimalException:
            return True
    return False
