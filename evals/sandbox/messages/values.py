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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import MalformedError, Node, UnsendableError, describe, find_form
from laguna_serve.evals.sandbox.messages.making import IMMUTABLE, MUTABLE, set_attributes

__all__ = ["MUTABLE", "Bounds", "Decoder", "Encoder", "MalformedError", "Node", "UnsendableError"]
# Gives the node (its items empty) and the children of what has no form of its own, or None.
Refer = Callable[[Any], tuple[Node, list[Any]] | None]
# Gives the value of a node that `Refer` made on the other side: its tag, extra, and decoded items.
Resolve = Callable[[str, Any, list[Any]], Any]
SMALL_INT = 1 << 63
MAX_DEPTH = 20_000
PLAIN = frozenset((str, bool, type(None), float))
SCALARS = PLAIN | {int}


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
            if not integers or (min(integers) > -SMALL_INT and max(integers) < SMALL_INT):
                return values
        return [self._item(value) for value in values]

    def encode_content(self, value: Any, node: Node) -> Node:
        """Encode what a known object has become, in the form of the node as which it arrived."""
        tag, extra, children = describe(value, type(value), node[0])
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
        form = find_form(value, kind)
        if form is None:
            referred = self._refer(value)
            if referred is None:
                raise UnsendableError(f"expected a value that can be sent, got one of type {kind.__name__}")
            node, children = referred
        else:
            if form in (str, float) or (form is int and -SMALL_INT < value < SMALL_INT):
                return form(value) if form is not str else str.__str__(value)
            tag, extra, children = describe(value, form)
            node = [tag, extra, []]
        if children:
            self._queue.append((node, children))
        self.nodes.append(node)
        self.objects.append(value)  # kept, or another object might get its id
        number = len(self.nodes) - 1
        self._memo[key] = item = [number if self._known is None else -number - 1]
        return item


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
        """Decode the value of an item.

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
