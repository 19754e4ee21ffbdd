"""Values as JSON: what may travel between a program under test and its tests. Never pickle.

A message holds a flat table of nodes; a container is a node, and what it contains is a scalar or the number of another
node. So one object seen twice stays one object, cycles have a form, nothing nests deeply in JSON, and neither side
recurses over what the other sent. Node: [tag, extra, items]. Item: None, bool, str, float, int below 2^63 as they are;
[n] is node n of this message, in an answer [n ≥ 0] is the receiver's own object n of the call, [n < 0] node -n - 1.

A value of a subclass arrives as its nearest base here. What has no form (functions, iterators, objects of other
classes) is left to the caller. Decoding builds known types alone, so nothing that arrives can run code, and it refuses
what is small here but huge once looked at (`Bounds`).
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import keyword
import math
import pathlib
import sys
import types
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Node = list[Any]
# Gives the node (its items empty) and the children of what has no form of its own, or None.
Refer = Callable[[Any], tuple[Node, list[Any]] | None]
# Gives the value of a node that `Refer` made on the other side: its tag, extra, and decoded items.
Resolve = Callable[[str, Any, list[Any]], Any]
SMALL_INT = 1 << 63
MAX_DEPTH = 20_000
PLAIN = frozenset((str, bool, type(None), float))
SCALARS = PLAIN | {int}
ARRAY_CODES = frozenset("bBuhHiIlLqQfd")
NUMPY_KINDS = frozenset("biufcSUmM")
KEYS, VALUES, ITEMS = type({}.keys()), type({}.values()), type({}.items())


class UnsendableError(Exception):
    """A value that has no form, or is too large."""


class MalformedError(Exception):
    """Nodes that `Encoder` did not make."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one message may come to once it is looked at: items counted with repetition, and levels."""

    items: int
    depth: int = MAX_DEPTH


class Encoder:
    """Values of one message. `known`: objects that the other side sent, by id, and their numbers there."""

    def __init__(self, refer: Refer, known: dict[int, int] | None = None) -> None:
        self.nodes: list[Node] = []
        self.objects: list[Any] = []
        self._refer, self._known = refer, known
        self._memo: dict[int, Any] = {}
        self._queue: list[tuple[Node, list[Any]]] = []

    def encode(self, value: Any) -> Any:
        """One value as an item; its nodes go into `nodes`.

        Raises:
            UnsendableError: it, or something in it, has no form.
        """
        item = self._item(value)
        while self._queue:
            node, children = self._queue.pop()
            node[2] = self.encode_items(children)
        return item

    def encode_items(self, values: list[Any]) -> list[Any]:
        """Items of many values; new nodes among them are queued."""
        kinds = set(map(type, values))
        if kinds <= SCALARS:
            integers = values if kinds == {int} else [value for value in values if type(value) is int]
            if not integers or (-SMALL_INT < min(integers) and max(integers) < SMALL_INT):
                return values
        return [self._item(value) for value in values]

    def encode_content(self, value: Any, node: Node) -> Node:
        """What a known object has become, in the form of the node as which it arrived."""
        tag, extra, children = _describe(value, type(value), node[0])
        changed = [tag, extra, self.encode_items(children)]
        while self._queue:
            queued, more = self._queue.pop()
            queued[2] = self.encode_items(more)
        return changed

    def _item(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN or (kind is int and -SMALL_INT < value < SMALL_INT):
            return value
        key = id(value)
        if self._known is not None and key in self._known:
            return [self._known[key]]
        if key in self._memo:
            return self._memo[key]
        form = _find_form(value, kind)
        if form is None:
            referred = self._refer(value)
            if referred is None:
                raise UnsendableError(f"expected a value that can be sent, got one of type {kind.__name__}")
            node, children = referred
        else:
            if form in (str, float) or (form is int and -SMALL_INT < value < SMALL_INT):
                return form(value) if form is not str else str.__str__(value)
            tag, extra, children = _describe(value, form)
            node = [tag, extra, []]
        if children:
            self._queue.append((node, children))
        self.nodes.append(node)
        self.objects.append(value)  # kept, or another object might get its id
        number = len(self.nodes) - 1
        self._memo[key] = item = [number if self._known is None else -number - 1]
        return item


def _find_form(value: Any, kind: type) -> type | None:
    """The type as which a value travels: its own, or the nearest base that has a form."""
    if kind in FORMS:
        return kind
    if isinstance(value, type):
        return type if TYPES.get(value.__name__) is value else None
    for base in kind.__mro__:
        if base in FORMS and base is not type:
            return base
    module = kind.__module__
    if module == "numpy" and "numpy" in sys.modules and _is_plain_numpy(value):
        return sys.modules["numpy"].ndarray  # type: ignore[no-any-return]
    return None


def _is_plain_numpy(value: Any) -> bool:
    numpy = sys.modules["numpy"]
    return isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in NUMPY_KINDS


def _describe(value: Any, form: type, tag: str = "") -> tuple[str, Any, list[Any]]:
    """Tag, extra and children. `tag`: the one that the object had, where it is described again."""
    if tag == "record":
        return "record", type(value).__name__, list_attributes(value)
    if form in FORMS:
        return FORMS[form](value)
    kind = next((base for base in type(value).__mro__ if base in FORMS), None)
    if kind is not None:
        return FORMS[kind](value)
    if type(value).__module__ == "numpy":
        tag = "ndarray" if isinstance(value, sys.modules["numpy"].ndarray) else "npscalar"
        return tag, [value.dtype.str, list(value.shape), value.tobytes().hex()], []
    raise UnsendableError(f"expected a value that can be sent, got one of type {type(value).__name__}")


def list_attributes(value: Any) -> list[Any]:
    """An object's own attributes, names and values alternating, slots among them."""
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
    """A time zone: its name, its offset from UTC in seconds, or None."""
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
        *(uuid.UUID, pathlib.PurePosixPath, pathlib.PosixPath),
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


class Decoder:
    """The values of a message's nodes. `own`: the receiver's objects that an answer may name."""

    def __init__(self, nodes: Any, resolve: Resolve, bounds: Bounds, own: list[Any] | None = None) -> None:
        self.nodes: list[Node] = nodes if isinstance(nodes, list) else []
        self.objects: list[Any] = [None] * len(self.nodes)
        self._resolve, self._own = resolve, own
        self._state = bytearray()  # 1: being built, 2: built
        try:
            self._check(bounds)
            self._build()
        except UnsendableError:
            raise
        except Exception as error:
            raise MalformedError(f"expected nodes, got what gives {type(error).__name__}: {error}") from error

    def decode(self, item: Any) -> Any:
        """The value of an item.

        Raises:
            MalformedError: it is none.
        """
        if type(item) is not list:
            if isinstance(item, dict):
                raise MalformedError("expected an item, got an object")
            return item
        try:
            (number,) = item
            if self._own is not None and number >= 0:
                return self._own[number]
            return self.objects[self._index(number)]
        except (ValueError, TypeError, IndexError) as error:
            raise MalformedError(f"expected the number of a node, got {str(item)[:40]}") from error

    def replace_own(self, objects: list[Any]) -> None:
        """From now on the answer names these in the place of the receiver's own objects."""
        self._own = objects
        self._build()

    def fill(self, value: Any, node: Node) -> None:
        """Make an object of the receiver's what a node says, in place."""
        tag, extra, items = node
        values = [self.decode(item) for item in items]
        if tag == "record":
            set_attributes(value, values)
        else:
            MUTABLE[tag][1](value, values, extra)

    def _index(self, number: int) -> int:
        index = number if self._own is None else -number - 1
        if not isinstance(number, int) or index < 0:
            raise ValueError
        return index

    def _children(self, index: int) -> Iterable[int]:
        for item in self.nodes[index][2]:
            if type(item) is list and (self._own is None or item[0] < 0):
                yield self._index(item[0])

    def _check(self, bounds: Bounds) -> None:
        """Refuse what would be too large or too deep for whoever compares, prints or copies it."""
        sizes, depths = [0] * len(self.nodes), [0] * len(self.nodes)
        state = bytearray(len(self.nodes))
        for root in range(len(self.nodes)):
            stack = [root] if not state[root] else []
            while stack:
                index = stack[-1]
                if state[index] == 0:
                    state[index] = 1
                    waiting = [child for child in self._children(index) if not state[child]]
                    if waiting:
                        stack += waiting
                        continue
                stack.pop()
                if state[index] == 2:
                    continue
                children = list(self._children(index))
                # What is still open here is an object within itself: whoever looks at it stops there.
                sizes[index] = _measure(self.nodes[index]) + sum(sizes[child] for child in children)
                depths[index] = 1 + max((depths[child] for child in children), default=0)
                if sizes[index] > bounds.items or depths[index] > bounds.depth:
                    raise UnsendableError(
                        f"expected a value of at most {bounds.items} items and {bounds.depth} levels, got more"
                    )
                state[index] = 2

    def _build(self) -> None:
        """Empty mutable objects first, then what is immutable (children before parents), then the contents."""
        self._state, fillers = bytearray(len(self.nodes)), []
        for index, (tag, extra, _) in enumerate(self.nodes):
            if tag in MUTABLE:
                self.objects[index], self._state[index] = MUTABLE[tag][0](extra), 2
                fillers.append(index)
            elif tag == "record":
                self.objects[index], self._state[index] = self._resolve(tag, extra, []), 2
                fillers.append(index)
        for root in range(len(self.nodes) - 1, -1, -1):
            stack = [] if self._state[root] == 2 else [root]
            while stack:
                index = stack[-1]
                waiting = [child for child in self._children(index) if self._state[child] != 2]
                if waiting:
                    if self._state[index] == 1:
                        raise MalformedError("immutable values within themselves")
                    self._state[index] = 1
                    stack += waiting
                    continue
                stack.pop()
                if self._state[index] != 2:
                    self.objects[index], self._state[index] = self._construct(*self.nodes[index]), 2
        # Records first: they may be keys.
        for index in sorted(fillers, key=lambda index: self.nodes[index][0] != "record"):
            tag, extra, items = self.nodes[index]
            values = [self.decode(item) for item in items] if _has_nodes(items) else items
            if tag == "record":
                set_attributes(self.objects[index], values)
            else:
                MUTABLE[tag][1](self.objects[index], values, extra)

    def _construct(self, tag: str, extra: Any, items: list[Any]) -> Any:
        values = [self.decode(item) for item in items]
        if tag in IMMUTABLE:
            return IMMUTABLE[tag](extra, values)
        return self._resolve(tag, extra, values)


def _has_nodes(items: list[Any]) -> bool:
    return list in set(map(type, items)) or dict in set(map(type, items))


def _measure(node: Node) -> int:
    """How many items a node comes to when it is looked at, without its children."""
    tag, extra, items = node
    if tag == "range":
        start, stop, step = (item if isinstance(item, int) else SMALL_INT for item in items)
        return _count_range(start, stop, step)
    texts = extra if isinstance(extra, list) else [extra]
    return 1 + len(items) + sum(len(text) // 16 for text in texts if isinstance(text, str))


def _count_range(start: int, stop: int, step: int) -> int:
    return max(0, (stop - start + step - (1 if step > 0 else -1)) // step) + 1


def set_attributes(value: Any, parts: list[Any]) -> None:
    """Replace an object's own attributes."""
    own = getattr(value, "__dict__", None)
    if own is not None:
        own.clear()
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        object.__setattr__(value, name, part)


def _fill_dict(value: Any, parts: list[Any], _: Any) -> None:
    dict.clear(value)
    for key, part in zip(parts[::2], parts[1::2], strict=True):
        dict.__setitem__(value, key, part)


def _fill_ordered(value: Any, parts: list[Any], _: Any) -> None:
    value.clear()
    for key, part in zip(parts[::2], parts[1::2], strict=True):
        value[key] = part


def _fill_list(value: Any, parts: list[Any], _: Any) -> None:
    value[:] = parts


def _fill_set(value: Any, parts: list[Any], _: Any) -> None:
    value.clear()
    value.update(parts)


def _fill_deque(value: Any, parts: list[Any], _: Any) -> None:
    value.clear()
    value.extend(parts)


def _fill_bytes(value: Any, _: list[Any], extra: Any) -> None:
    value[:] = bytes.fromhex(extra)


def _fill_array(value: Any, _: list[Any], extra: Any) -> None:
    del value[:]
    value.frombytes(bytes.fromhex(extra[1]))


def _fill_namespace(value: Any, parts: list[Any], _: Any) -> None:
    vars(value).clear()
    vars(value).update(zip(parts[::2], parts[1::2], strict=True))


def _make_array(extra: Any) -> Any:
    if extra[0] not in ARRAY_CODES:
        raise MalformedError(f"an array of {extra[0]!r}")
    return array.array(extra[0])


def _fill_ndarray(value: Any, _: list[Any], extra: Any) -> None:
    fresh = _make_ndarray(extra)
    value[...] = fresh


def _make_ndarray(extra: Any) -> Any:
    import numpy

    kind, shape, data = extra
    dtype = numpy.dtype(kind)
    if dtype.kind not in NUMPY_KINDS:
        raise MalformedError(f"an array of {kind!r}")
    return numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()


# tag: (an empty object, how it is filled: object, decoded items, extra)
MUTABLE: dict[str, tuple[Callable[[Any], Any], Callable[[Any, list[Any], Any], None]]] = {
    "list": (lambda _: [], _fill_list),
    "dict": (lambda _: {}, _fill_dict),
    "set": (lambda _: set(), _fill_set),
    "odict": (lambda _: collections.OrderedDict(), _fill_ordered),
    "counter": (lambda _: collections.Counter(), _fill_dict),
    "defaultdict": (lambda extra: collections.defaultdict(None if extra is None else TYPES[extra]), _fill_dict),
    "deque": (lambda extra: collections.deque(maxlen=extra), _fill_deque),
    "bytearray": (lambda _: bytearray(), _fill_bytes),
    "array": (_make_array, _fill_array),
    "namespace": (lambda _: types.SimpleNamespace(), _fill_namespace),
    "ndarray": (_make_ndarray, _fill_ndarray),
}
_named: dict[tuple[str, ...], Any] = {}


def _make_namedtuple(extra: Any, values: list[Any]) -> Any:
    key = tuple(map(str, extra))
    if any(not name.isidentifier() or keyword.iskeyword(name) for name in key) or len(key) != len(values) + 1:
        return tuple(values)
    if key not in _named:
        _named[key] = collections.namedtuple(key[0], key[1:], rename=True)  # noqa: PYI024
    return _named[key](*values)


def _make_zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        import zoneinfo

        return zoneinfo.ZoneInfo(zone)
    return datetime.timezone(datetime.timedelta(seconds=zone))


def _make_fraction(_: Any, values: list[Any]) -> Any:
    return fractions.Fraction(*values)


def _make_decimal(extra: Any, _: list[Any]) -> Any:
    return decimal.Decimal(extra)


IMMUTABLE: dict[str, Callable[[Any, list[Any]], Any]] = {
    "bool": lambda extra, _: bool(extra),
    "str": lambda extra, _: str(extra),
    "float": lambda extra, _: float(extra),
    "int": lambda extra, _: int(extra, 16),
    "tuple": lambda _, values: tuple(values),
    "namedtuple": _make_namedtuple,
    "frozenset": lambda _, values: frozenset(values),
    "keys": lambda _, values: dict.fromkeys(values).keys(),
    "values": lambda _, values: dict(enumerate(values)).values(),
    "items": lambda _, values: dict(zip(values[::2], values[1::2], strict=True)).items(),
    "complex": lambda extra, _: complex(float(extra[0]), float(extra[1])),
    "bytes": lambda extra, _: bytes.fromhex(extra),
    "memoryview": lambda extra, _: memoryview(bytes.fromhex(extra)),
    "range": lambda _, values: range(*values),
    "slice": lambda _, values: slice(*values),
    "decimal": _make_decimal,
    "fraction": _make_fraction,
    "date": lambda extra, _: datetime.date(*extra),
    "datetime": lambda extra, _: datetime.datetime(*extra[0], fold=extra[1], tzinfo=_make_zone(extra[2])),
    "time": lambda extra, _: datetime.time(*extra[0], fold=extra[1], tzinfo=_make_zone(extra[2])),
    "timedelta": lambda extra, _: datetime.timedelta(*extra),
    "uuid": lambda extra, _: uuid.UUID(hex=extra),
    "path": lambda extra, _: pathlib.PosixPath(extra),
    "purepath": lambda extra, _: pathlib.PurePosixPath(extra),
    "npscalar": lambda extra, _: _make_ndarray(extra)[()],
    "ellipsis": lambda _, __: ...,
    "notimplemented": lambda _, __: NotImplemented,
    "type": lambda extra, _: TYPES[extra],
}


def is_finite(value: Any) -> bool:
    """False of a number that is infinite or none."""
    try:
        return not isinstance(value, int | float | complex | decimal.Decimal) or _is_finite_number(value)
    except (OverflowError, decimal.DecimalException):
        return True


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, complex):
        return math.isfinite(value.real) and math.isfinite(value.imag)
    return bool(value.is_finite()) if isinstance(value, decimal.Decimal) else math.isfinite(value)
