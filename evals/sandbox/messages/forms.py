"""The forms of types: what a value of each consists of on the wire, and how one is made from it.

Decoding builds these types alone. A subclass of a program's travels as its nearest base here: the bases' own methods
are used, what a subclass overrides plays no part.
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import math
import pathlib
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

Node = list[Any]
# Keyword arguments; what travels beside a call or an answer; an exception or a class in words; a program's names.
Named = dict[str, Any]
Options = dict[str, Any]
Description = dict[str, Any]
Space = dict[str, Any]
ARRAY_CODES = frozenset("bBuhHiIlLqQfd")
NUMPY_KINDS = frozenset("biufcSUmM")
# Their subclasses are what they override: those stay objects of the program's.
EXACT = frozenset(
    (
        *(collections.ChainMap, collections.UserDict, collections.UserList, collections.UserString),
        types.MappingProxyType,
    )
)
EMPTY: dict[Any, Any] = {}
KEYS, VALUES, ITEMS = type(EMPTY.keys()), type(EMPTY.values()), type(EMPTY.items())


class UnsendableError(Exception):
    """A value that has no form, or is too large."""


class MalformedError(Exception):
    """Nodes that `Encoder` did not make."""


def find_form(value: Any, kind: type) -> type | None:
    """Find the type as which a value travels: its own, or the nearest base that has a form."""
    if isinstance(value, type):
        return type if TYPES.get(value.__name__) is value else None
    if kind in FORMS:
        return kind
    for base in kind.__mro__:
        if base in FORMS and base is not type and base not in EXACT:
            return base
    module = kind.__module__
    if module == "numpy" and "numpy" in sys.modules and _is_plain_numpy(value):
        return sys.modules["numpy"].ndarray  # type: ignore[no-any-return]
    return None


def _is_plain_numpy(value: Any) -> bool:
    numpy = sys.modules["numpy"]
    return isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in NUMPY_KINDS


def describe(value: Any, form: type, tag: str = "") -> tuple[str, Any, list[Any]]:
    """Tag, extra and children. `tag`: the one that the object had, where it is described again."""
    if tag == "record":
        return "record", type(value).__name__, list_attributes(value)
    if form in FORMS:
        return FORMS[form](value)
    kind = next((base for base in type(value).__mro__ if base in FORMS and base not in EXACT), None)
    if kind is not None:
        return FORMS[kind](value)
    if type(value).__module__ == "numpy":
        tag = "ndarray" if isinstance(value, sys.modules["numpy"].ndarray) else "npscalar"
        return tag, [value.dtype.str, list(value.shape), value.tobytes().hex()], []
    raise UnsendableError(f"expected a value that can be sent, got one of type {type(value).__name__}")


def list_attributes(value: Any) -> list[Any]:
    """List an object's own attributes, names and values alternating, slots among them."""
    pairs = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                pairs[name] = getattr(value, name)
    return [part for pair in pairs.items() for part in pair]


def _tuple(value: Any) -> tuple[str, Any, list[Any]]:
    fields = getattr(type(value), "_fields", None)
    if isinstance(fields, tuple) and len(fields) == len(value) and all(isinstance(name, str) for name in fields):
        return "namedtuple", [type(value).__name__, *fields], list(tuple.__iter__(value))
    return "tuple", None, list(tuple.__iter__(value))


def _defaultdict(value: Any) -> tuple[str, Any, list[Any]]:
    factory = value.default_factory
    name = factory.__name__ if isinstance(factory, type) and TYPES.get(factory.__name__) is factory else None
    return "defaultdict", name, _pairs(value)


def _pairs(value: Any) -> list[Any]:
    return [part for pair in dict.items(value) for part in pair]


def _zone(value: Any) -> Any:
    """Describe a time zone: its name, its offset from UTC in seconds, or None."""
    if value.tzinfo is None:
        return None
    key = getattr(value.tzinfo, "key", None)
    if isinstance(key, str):
        return key
    offset = value.utcoffset()
    return None if offset is None else offset.total_seconds()


def _date(value: datetime.date) -> tuple[str, Any, list[Any]]:
    return "date", [value.year, value.month, value.day], []


def _datetime(value: datetime.datetime) -> tuple[str, Any, list[Any]]:
    fields = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return "datetime", [fields, value.fold, _zone(value)], []


def _time(value: datetime.time) -> tuple[str, Any, list[Any]]:
    return "time", [[value.hour, value.minute, value.second, value.microsecond], value.fold, _zone(value)], []


TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(bool, bytearray, bytes, complex, dict, enumerate, filter, float, frozenset, int, list, map, memoryview),
        *(object, range, reversed, set, slice, str, tuple, type, zip, type(None), type(...), types.SimpleNamespace),
        *(collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque, array.array),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
        *(uuid.UUID, pathlib.PurePosixPath, pathlib.PosixPath, *EXACT),
    )
}
# The bases' own methods: what a subclass overrides plays no part.
FORMS: dict[type, Callable[[Any], tuple[str, Any, list[Any]]]] = {
    str: lambda v: ("str", str.__str__(v), []),
    bool: lambda v: ("bool", bool(v), []),
    float: lambda v: ("float", float.__float__(v), []),
    int: lambda v: ("int", hex(int.__int__(v)), []),
    list: lambda v: ("list", None, list(list.__iter__(v))),
    tuple: _tuple,
    collections.Counter: lambda v: ("counter", None, _pairs(v)),
    collections.defaultdict: _defaultdict,
    collections.OrderedDict: lambda v: (
        "odict",
        None,
        [part for key in collections.OrderedDict.__iter__(v) for part in (key, dict.__getitem__(v, key))],
    ),
    dict: lambda v: ("dict", None, _pairs(v)),
    set: lambda v: ("set", None, list(set.__iter__(v))),
    frozenset: lambda v: ("frozenset", None, list(frozenset.__iter__(v))),
    collections.deque: lambda v: ("deque", v.maxlen, list(collections.deque.__iter__(v))),
    KEYS: lambda v: ("keys", None, list(v)),
    VALUES: lambda v: ("values", None, list(v)),
    ITEMS: lambda v: ("items", None, [part for pair in v for part in pair]),
    collections.ChainMap: lambda v: ("chainmap", None, list(v.maps)),
    collections.UserDict: lambda v: ("userdict", None, _pairs(v.data)),
    collections.UserList: lambda v: ("userlist", None, list(v.data)),
    collections.UserString: lambda v: ("userstring", str(v.data), []),
    types.MappingProxyType: lambda v: ("mappingproxy", None, [part for pair in v.items() for part in pair]),
    complex: lambda v: ("complex", [v.real, v.imag], []),
    bytes: lambda v: ("bytes", bytes(v).hex(), []),
    bytearray: lambda v: ("bytearray", bytes(v).hex(), []),
    memoryview: lambda v: ("memoryview", bytes(v).hex(), []),
    array.array: lambda v: ("array", [v.typecode, v.tobytes().hex()], []),
    range: lambda v: ("range", None, [v.start, v.stop, v.step]),
    slice: lambda v: ("slice", None, [v.start, v.stop, v.step]),
    decimal.Decimal: lambda v: ("decimal", decimal.Decimal.__str__(v), []),
    fractions.Fraction: lambda v: ("fraction", None, [v.numerator, v.denominator]),
    datetime.datetime: _datetime,
    datetime.date: _date,
    datetime.time: _time,
    datetime.timedelta: lambda v: ("timedelta", [v.days, v.seconds, v.microseconds], []),
    uuid.UUID: lambda v: ("uuid", v.hex, []),
    pathlib.PosixPath: lambda v: ("path", str(v), []),
    pathlib.PurePosixPath: lambda v: ("purepath", str(v), []),
    type(...): lambda v: ("ellipsis", None, []),
    type(NotImplemented): lambda v: ("notimplemented", None, []),
    types.SimpleNamespace: lambda v: ("namespace", None, [part for pair in vars(v).items() for part in pair]),
    type: lambda v: ("type", v.__name__, []),
}


def is_finite(value: Any) -> bool:
    """Return False for a number that is infinite or NaN."""
    try:
        return not isinstance(value, int | float | complex | decimal.Decimal) or _is_finite_number(value)
    except (OverflowError, decimal.DecimalException):
        return True


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, complex):
        return math.isfinite(value.real) and math.isfinite(value.imag)
    return bool(value.is_finite()) if isinstance(value, decimal.Decimal) else math.isfinite(value)
