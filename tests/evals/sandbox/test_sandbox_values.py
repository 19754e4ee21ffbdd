"""What may cross the pipe comes out as it went in, shares what it shared, and is refused when it would be huge."""

from __future__ import annotations

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import json
import math
import pathlib
import types
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laguna_serve.evals.sandbox.messages.values import Bounds, Decoder, Encoder, MalformedError, UnsendableError

BOUNDS = Bounds(100_000)
Point = collections.namedtuple("Point", "x y")


def refuse(*_: Any) -> None:
    return None


def fail(*_: Any) -> Any:
    raise AssertionError("nothing was referred to")


def send(value: Any, bounds: Bounds = BOUNDS) -> Any:
    """A value, over the pipe and back."""
    encoder = Encoder(refuse)
    item = encoder.encode(value)
    item, nodes = json.loads(json.dumps([item, encoder.nodes]))
    return Decoder(nodes, fail, bounds).decode(item)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None)), st.binary(),
    st.complex_numbers(), st.decimals(allow_nan=False), st.fractions(), st.dates(), st.datetimes(), st.times(),
    st.timedeltas(), st.uuids(), st.integers(min_value=1 << 62, max_value=1 << 200),
)  # fmt: skip
KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()), st.frozensets(st.integers()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.sets(KEYS), st.frozensets(KEYS),
        st.lists(inner).map(collections.deque), st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    ),
    max_leaves=25,
)  # fmt: skip


def show(value: Any) -> str:
    """As repr, but that the order in a set, which may change, does not count; NaN is like itself."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{sorted(map(show, value))}"
    if isinstance(value, dict):
        return f"{type(value).__name__}{[(show(key), show(item)) for key, item in value.items()]}"
    if isinstance(value, list | tuple | collections.deque):
        return f"{type(value).__name__}{[show(item) for item in value]}"
    return f"{type(value).__name__} {value!r}"


@pytest.mark.slow
@settings(max_examples=60)
@given(VALUES)
def test_any_value_comes_back_as_it_was(value: Any) -> None:
    assert show(send(value)) == show(value)


OTHERS = [
    {1: 2}.keys(), {1: 2}.values(), {1: 2}.items(), collections.OrderedDict([(2, 1), (1, 2)]),
    collections.Counter("abca"), collections.defaultdict(list, {1: [2]}), collections.deque([1, 2], maxlen=5),
    array.array("i", [1, 2]), bytearray(b"a"),
    range(2, 10, 3), slice(1, None, 2), ..., NotImplemented, int, decimal.Decimal("NaN"), math.inf, -0.0,
    types.SimpleNamespace(a=[1]), pathlib.Path("/a/b"), datetime.UTC.utcoffset(None), uuid.UUID(int=5),
    datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), fractions.Fraction(1, 3),
    np.arange(6.0).reshape(2, 3), np.array([True, False]), np.float32(1.5), np.int64(3), np.array(2.5),
]  # fmt: skip


@pytest.mark.parametrize("value", OTHERS, ids=[f"{type(value).__name__}-{i}" for i, value in enumerate(OTHERS)])
def test_types_of_the_library_come_back(value: Any) -> None:
    found = send(value)
    assert type(found).__name__ == type(value).__name__
    assert repr(found) == repr(value)
    assert bytes(send(memoryview(b"ab"))) == b"ab"


def test_fields_of_a_named_tuple_are_there() -> None:
    assert send([Point(1, 2)])[0].y == 2


def test_sharing_and_cycles_stay() -> None:
    inner: list[Any] = []
    first, second = send([inner, inner])
    assert first is second
    cycle: list[Any] = [1]
    cycle += [cycle, (cycle, {"again": cycle})]
    found = send(cycle)
    assert found[1] is found
    assert found[2][0] is found
    assert found[2][1]["again"] is found


@pytest.mark.slow
def test_depth_is_no_matter_of_recursion() -> None:
    value: Any = 1
    for _ in range(15_000):
        value = [value]
    found, depth = send(value), 0
    while isinstance(found, list):
        (found,), depth = found, depth + 1
    assert depth == 15_000
    with pytest.raises(UnsendableError, match="levels"):
        send([value], Bounds(100_000, 15_000))


def doubled(times: int) -> Any:
    value: Any = [0]
    for _ in range(times):
        value = [value, value]
    return value


HUGE = {
    "range": range(95_000_000),
    "range without end": range(10**30),
    "range from the top": range(10**9, 0, -1),
    "repeated references": doubled(60),
    "repeated bytes": [b"x" * 100_000] * 100,
    "repeated arrays": [np.zeros(10_000)] * 100,
    "ranges of ranges": [range(9000)] * 100,
    "as keys": dict.fromkeys(range(60_000), (1,)),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_what_is_small_on_the_wire_and_huge_to_look_at_is_refused(value: Any) -> None:
    with pytest.raises(UnsendableError, match="expected a value of at most 100000 items"):
        send(value)


def test_what_is_shared_within_reason_is_not_refused() -> None:
    assert send(doubled(10)) == doubled(10)
    assert send(range(99_000)) == range(99_000)


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=4), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)
TAGS = st.sampled_from(
    [
        "list",
        "dict",
        "tuple",
        "set",
        "int",
        "range",
        "namedtuple",
        "array",
        "ndarray",
        "decimal",
        "datetime",
        "record",
        "x",
    ]
)
NODES = st.lists(st.one_of(st.tuples(TAGS, JUNK, st.lists(JUNK, max_size=4)).map(list), JUNK), max_size=6)


@pytest.mark.slow
@settings(max_examples=300)
@given(NODES, JUNK)
def test_forged_nodes_are_refused_and_never_raise_anything_else(nodes: Any, item: Any) -> None:
    def resolve(tag: str, extra: Any, values: list[Any]) -> Any:
        raise LookupError(tag)

    with contextlib.suppress(MalformedError, UnsendableError):
        Decoder(nodes, resolve, BOUNDS).decode(item)


def test_content_that_changed_is_told_from_content_that_did_not() -> None:
    encoder = Encoder(refuse)
    item = encoder.encode([[1, 2], {"a": (1, [2])}])
    decoder = Decoder(json.loads(json.dumps(encoder.nodes)), fail, BOUNDS)
    value = decoder.decode(item)
    known = {id(part): index for index, part in enumerate(decoder.objects)}
    same = [
        Encoder(refuse, known).encode_content(part, node)
        for part, node in zip(decoder.objects, decoder.nodes, strict=False)
    ]
    assert same == decoder.nodes
    value[0].append(value[1])
    answer = Encoder(refuse, known)
    changed = answer.encode_content(decoder.objects[item[0]], decoder.nodes[item[0]])
    assert changed == decoder.nodes[item[0]], "the outer list is what it was"
    inner = known[id(value[0])]
    assert answer.encode_content(value[0], decoder.nodes[inner])[2] == [1, 2, [known[id(value[1])]]]
