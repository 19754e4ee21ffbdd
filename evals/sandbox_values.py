"""Plain values as tagged JSON: what may travel between a program under test and its tests. Never pickle.

None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range and a few builtin
types; a value of a subclass arrives as its base. Callables and iterators are left to the caller, everything else is
refused by name. Decoding builds builtin objects alone, so nothing that arrives can run code here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Integers beyond this go as hexadecimal: Python limits how long a decimal it reads or writes.
DECIMAL_INT = 1 << 63
KINDS: tuple[type, ...] = (bool, bytes, complex, dict, float, frozenset, int, list, object, range, set, str, tuple)
TYPES = {kind.__name__: kind for kind in KINDS}
SAME = (str, bool, type(None))
NESTED = (list, dict)
Refer = Callable[[Any], Any]
Resolve = Callable[[str, Any], Any]


class UnsendableError(Exception):
    """A value that has no form."""


def encode(value: Any, refer: Refer) -> Any:
    """A value as JSON; `refer` gives the form of what stays on this side, or None.

    Raises:
        UnsendableError: it has no form.
        RecursionError: it contains itself, or is nested too deeply.
    """
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if kind not in FORMS:
        kind = next((base for base in FORMS if isinstance(value, base)), kind)
    if kind in FORMS:
        return FORMS[kind](value, refer)
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    form = refer(value)
    if form is None:
        name = type(value).__name__
        raise UnsendableError(f"expected plain values, functions or iterators, got a value of type {name}")
    return form


def _encode_items(tag: str, kind: Any) -> Callable[[Any, Refer], Any]:
    def encode_all(value: Any, refer: Refer) -> Any:
        # Most items are what they are in JSON: HumanEval+ passes a thousand lists of numbers per problem.
        return [tag, *(item if type(item) in SAME else encode(item, refer) for item in kind.__iter__(value))]

    return encode_all


# The bases' own methods: what a subclass overrides plays no part.
FORMS: dict[type, Callable[[Any, Refer], Any]] = {
    str: lambda v, _: str.__str__(v),
    int: lambda v, _: int.__int__(v) if -DECIMAL_INT < v < DECIMAL_INT else ["int", hex(int.__int__(v))],
    float: lambda v, _: float.__float__(v) if v - v == 0 else ["float", float.__repr__(v)],
    list: _encode_items("list", list),
    tuple: _encode_items("tuple", tuple),
    dict: lambda v, refer: ["dict", *([encode(key, refer), encode(item, refer)] for key, item in dict.items(v))],
    set: _encode_items("set", set),
    frozenset: _encode_items("frozenset", frozenset),
    complex: lambda v, _: ["complex", repr(v.real), repr(v.imag)],
    bytes: lambda v, _: ["bytes", v.hex()],
    bytearray: lambda v, _: ["bytearray", v.hex()],
    range: lambda v, refer: ["range", encode(v.start, refer), encode(v.stop, refer), encode(v.step, refer)],
}


def decode(item: Any, resolve: Resolve) -> Any:
    """The value of what `encode` made; `resolve` is told the tag and number of what stayed on the other side.

    Raises:
        LookupError, TypeError, ValueError, OverflowError, RecursionError: `encode` did not make it.
    """
    if isinstance(item, dict):
        raise TypeError("an object where only arrays are")
    if not isinstance(item, list):
        return item
    tag, *rest = item
    match tag:
        case "list":
            return _decode_items(rest, resolve)
        case "tuple":
            return tuple(_decode_items(rest, resolve))
        case "dict":
            return {decode(key, resolve): decode(part, resolve) for key, part in rest}
        case "set":
            return set(_decode_items(rest, resolve))
        case "frozenset":
            return frozenset(_decode_items(rest, resolve))
        case "int":
            return int(rest[0], 16)
        case "float":
            return float(rest[0])
        case "complex":
            return complex(float(rest[0]), float(rest[1]))
        case "bytes":
            return bytes.fromhex(rest[0])
        case "bytearray":
            return bytearray.fromhex(rest[0])
        case "range":
            return range(*(decode(part, resolve) for part in rest))
        case "type":
            return TYPES[rest[0]]
    return resolve(tag, rest[0])


def _decode_items(items: list[Any], resolve: Resolve) -> list[Any]:
    return [decode(item, resolve) if type(item) in NESTED else item for item in items]


def replace_content(old: Any, new: Any) -> None:
    """Make a list, dict, set or bytearray equal to another, in place, and so the ones within it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        old[:] = [_merge(a, b) for a, b in zip(old, new, strict=False)] + new[len(old) :]
    elif isinstance(old, dict):
        merged = {key: _merge(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple):
        for a, b in zip(old, new, strict=False):
            replace_content(a, b)


def _merge(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, list | dict | set | bytearray):
        replace_content(old, new)
        return old
    return new
