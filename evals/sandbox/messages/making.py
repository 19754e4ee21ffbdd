"""How a value is made from its form (forms.py): known types alone, so nothing that arrives can run code."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import keyword
import pathlib
import types
import uuid
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import ARRAY_CODES, NUMPY_KINDS, TYPES, MalformedError


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


def _fill_chain(value: Any, parts: list[Any], _: Any) -> None:
    value.maps[:] = parts


def _fill_user_dict(value: Any, parts: list[Any], extra: Any) -> None:
    _fill_dict(value.data, parts, extra)


def _fill_user_list(value: Any, parts: list[Any], _: Any) -> None:
    value.data[:] = parts


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
    "chainmap": (lambda _: collections.ChainMap(), _fill_chain),
    "userdict": (lambda _: collections.UserDict(), _fill_user_dict),
    "userlist": (lambda _: collections.UserList(), _fill_user_list),
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
        _named[key] = collections.namedtuple(key[0], key[1:], rename=True)
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
    "userstring": lambda extra, _: collections.UserString(str(extra)),
    "mappingproxy": lambda _, values: types.MappingProxyType(dict(zip(values[::2], values[1::2], strict=True))),
    "complex": lambda extra, _: complex(float(extra[0]), float(extra[1])),
    "bytes": lambda extra, _: bytes.fromhex(extra),
    "memoryview": lambda extra, _: memoryview(bytes.fromhex(extra)),
    "range": lambda _, values: range(*values),
    "slice": lambda _, values: slice(*values),
    "decimal": _make_decimal,
    "fraction": _make_fraction,
    "date": lambda extra, _: datetime.date(*extra),
    "datetime": lambda extra, _: datetime.datetime(*extra[0]).replace(tzinfo=_make_zone(extra[2]), fold=extra[1]),
    "time": lambda extra, _: datetime.time(*extra[0]).replace(tzinfo=_make_zone(extra[2]), fold=extra[1]),
    "timedelta": lambda extra, _: datetime.timedelta(*extra),
    "uuid": lambda extra, _: uuid.UUID(hex=extra),
    "path": lambda extra, _: pathlib.PosixPath(extra),
    "purepath": lambda extra, _: pathlib.PurePosixPath(extra),
    "npscalar": lambda extra, _: _make_ndarray(extra)[()],
    "ellipsis": lambda _, __: ...,
    "notimplemented": lambda _, __: NotImplemented,
    "type": lambda extra, _: TYPES[extra],
}
