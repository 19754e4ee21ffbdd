"""Calls over a pipe between the grader (the tests) and the worker (the program under test).

Both ends are a `Peer`: it calls a function of the other side, and while it waits it serves calls of its own functions,
so that functions, iterators and objects may be passed either way: they stay where they are, and the other side has a
proxy of them (proxies.py). What a call changed in the objects that it was given is written back into the caller's, and
an answer may be one of them. Frames are bounded in size. What values may travel, and in what form: values.py.

Messages are JSON lists: ["call", number, operation, items, named items, nodes, options], the operation "" for a plain
call; ["done" | "raised", item | description, {own node: content}, nodes, options]; ["unsendable", text].
Options "kept" and "keep" are of arguments that outlive their call (kept.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import Description, Named, Options
from laguna_serve.evals.sandbox.messages.kept import MAX_KEPT, TAGS, Kept, count_references
from laguna_serve.evals.sandbox.messages.pipe import PeerGone, Pipe, Unsendable
from laguna_serve.evals.sandbox.messages.values import (
    MUTABLE,
    Bounds,
    Decoder,
    Encoder,
    MalformedError,
    Node,
    UnsendableError,
)

UNREADABLE = (LookupError, TypeError, ValueError, RecursionError, OverflowError, AttributeError, MalformedError)
TEXT_CHARS = 500
CHANGEABLE = frozenset((*MUTABLE, "record"))


@dataclass(slots=True)
class Call:
    """One call that is under way: what was sent, and the objects that it stands for."""

    number: int
    operation: str
    encoder: Encoder
    items: list[Any]
    named: Named
    changes: dict[int, Node] = field(default_factory=dict)


class Peer(Pipe):
    """One end of the pipe. Numbers of this side's objects begin at 0."""

    def __init__(self, fd: int, message_bytes: int) -> None:
        super().__init__(fd, message_bytes)
        # Half of the bytes of a message: what it could have held as plain numbers.
        self.bounds = Bounds(message_bytes // 2)
        self.exported: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._kept_here, self._kept_there = Kept(), Kept()

    # What the two ends do differently.

    def refer(self, value: Any) -> tuple[Node, list[Any]] | None:
        """Make the node and the children of an object without a form of its own, or None."""
        raise NotImplementedError

    def resolve(self, tag: str, extra: Any, values: list[Any]) -> Any:
        """Make the value of a node that `refer` made on the other side."""
        raise NotImplementedError

    def operate(self, value: Any, operation: str, args: list[Any], named: Named) -> Any:
        """Do what the other side asks of an object of this one."""
        raise NotImplementedError

    def describe_error(self, error: BaseException) -> Description:
        """Describe an exception, for the other side; its values are left to `encode`."""
        raise NotImplementedError

    def make_error(self, description: Description, decode: Callable[[Any], Any], call: Call) -> BaseException:
        """Make the other side's exception, as one of this side."""
        raise NotImplementedError

    def list_options(self, call: Call) -> Options:
        """List what travels with a call besides its arguments."""
        return {}

    def enter(self, options: Options) -> Callable[[], Options]:
        """Take the options of a call that is served; the result gives those of the answer."""
        return dict

    def take_options(self, options: Options) -> None:
        """Take the options of an answer."""

    def may_change_kept(self) -> bool:
        """Whether later changes of kept arguments are written into the caller's."""
        return True

    def take_changes(self, call: Call, decoder: Decoder) -> None:
        """Write back what a call has changed."""
        for index, node in call.changes.items():
            decoder.fill(call.encoder.objects[index], node)

    # Calls.

    def export(self, value: Any) -> int:
        """Give an object of this side its number; the same each time."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.exported)
            self.exported.append(value)
        return number

    def call(self, number: int, operation: str, args: tuple[Any, ...], named: Named) -> Any:
        """Call an object of the other side, or operate on it.

        Raises:
            Unsendable: an argument or the result cannot be sent.
            Exception: what the other side raised.
            PeerExit, PeerGone: see there.
        """
        encoder = Encoder(self.refer)
        try:
            items = [encoder.encode(arg) for arg in args]
            call = Call(number, operation, encoder, items, {key: encoder.encode(arg) for key, arg in named.items()})
            options = self.list_options(call)
            if changes := self._kept_there.list_changes():
                options = {**options, "kept": changes}
            self.send(["call", number, operation, items, call.named, encoder.nodes, options])
        except UnsendableError as error:
            raise Unsendable(str(error)) from error
        while True:
            message = self.receive()
            if message[0] == "call":
                self._serve(message)
                continue
            return self._finish(call, message)

    def _finish(self, call: Call, message: list[Any]) -> Any:
        """Take an answer: the result, or what was raised."""
        try:
            kind, said, *rest = message
            if kind == "unsendable":
                raise Unsendable(str(said)[:TEXT_CHARS])
            changes, nodes, options = rest
            call.changes = {int(index): node for index, node in changes.items()}
            sent = call.encoder.nodes
            if any(
                sent[index][0] not in CHANGEABLE or node[0] != sent[index][0] for index, node in call.changes.items()
            ):
                raise ValueError("changes of what cannot change")
            self.take_options(options)
            decoder = Decoder(nodes, self.resolve, self.bounds, call.encoder.objects)
            self.take_changes(call, decoder)
            self._take_kept(call, options)
            if kind == "done":
                return self.take_result(call, said, decoder)
            if kind != "raised":
                raise ValueError(f"a message of kind {str(kind)[:20]}")
            error = self.make_error(said, decoder.decode, call)
        except UnsendableError as trouble:
            raise Unsendable(str(trouble)) from trouble
        except UNREADABLE as trouble:
            raise PeerGone(f"expected an answer, got {str(message)[:60]}") from trouble
        raise error

    def _take_kept(self, call: Call, options: Options) -> None:
        """Take what has become of arguments that the other side has kept, and those that it keeps of this call."""
        if changes := options.get("kept"):
            self._kept_there.take(changes, self.may_change_kept())
        for index in options.get("keep", []):
            if len(self._kept_there) >= MAX_KEPT or index < 0:
                raise ValueError("expected the number of an argument that may be kept")
            self._kept_there.add(call.encoder.objects[index], call.encoder.nodes[index][0])

    def take_result(self, call: Call, item: Any, decoder: Decoder) -> Any:
        """Take the result of a call."""
        return decoder.decode(item)

    def serve(self) -> None:
        """Serve calls until the other side closes (PeerGone)."""
        while True:
            self._serve(self.receive())

    def say(self, kind: str, value: Any) -> None:
        """Send a message that is no call."""
        self.send([kind, value])

    def _serve(self, message: list[Any]) -> None:
        """Run one of our functions for the other side, and answer."""
        try:
            kind, number, operation, items, named, nodes, options = message
            decoder = Decoder(nodes, self.resolve, self.bounds)
            args, keywords = [decoder.decode(item) for item in items], {}
            for name, item in named.items():
                keywords[str(name)] = decoder.decode(item)
            if kind != "call" or isinstance(number, bool) or number < 0:
                raise ValueError("no call")
            value = self.exported[number]
            self._kept_here.take(options.get("kept", {}))
        except UnsendableError as trouble:
            return self.send(["unsendable", str(trouble)])
        except UNREADABLE as trouble:
            raise PeerGone(f"expected a call, got {str(message)[:60]}") from trouble
        leave = self.enter(options)
        indices = [index for index, node in enumerate(nodes) if node[0] in TAGS][:MAX_KEPT]
        before = count_references(map(decoder.objects.__getitem__, indices))
        try:
            try:
                result = self.operate(value, str(operation), args, keywords)
            finally:
                more = leave()
            after = count_references(map(decoder.objects.__getitem__, indices))
            kept = [index for index, was, now in zip(indices, before, after, strict=True) if now > was]
            self._answer(decoder, result, None, {**more, **self._keep(decoder, kept)})
        except (PeerGone, Unsendable) as trouble:
            if isinstance(trouble, PeerGone):
                raise
            self.send(["unsendable", str(trouble)])
        except UnsendableError as trouble:
            self.send(["unsendable", str(trouble)])
        except BaseException as trouble:
            try:
                self._answer(decoder, None, trouble, more)
            except UnsendableError as second:
                self.send(["unsendable", str(second)])
        return None

    def _keep(self, decoder: Decoder, indices: list[int]) -> Options:
        """Make the options of an answer that tell of kept arguments: changes of earlier ones, and new ones."""
        options: Options = {}
        if changes := self._kept_here.list_changes():
            options["kept"] = changes
        if keep := indices[: MAX_KEPT - len(self._kept_here)]:
            options["keep"] = keep
            for index in keep:
                self._kept_here.add(decoder.objects[index], decoder.nodes[index][0])
        return options

    def _answer(self, decoder: Decoder, result: Any, error: BaseException | None, options: Options) -> None:
        known = {id(value): index for index, value in enumerate(decoder.objects) if decoder.nodes[index][0] != "yours"}
        encoder = Encoder(self.refer, known)
        if error is None:
            said = encoder.encode(result)
        else:
            description = self.describe_error(error)
            said = {name: _encode_or_drop(encoder, value) for name, value in description.items()}
        changes = {}
        for index, node in enumerate(decoder.nodes):
            if node[0] in CHANGEABLE:
                now = encoder.encode_content(decoder.objects[index], node)
                if not _is_same(now, node):
                    changes[index] = now
        self.send(["done" if error is None else "raised", said, changes, encoder.nodes, options])


def _is_same(now: Node, before: Node) -> bool:
    """Whether they are the same content; 1 and True and 1.0 are not."""
    if now[0] != before[0] or now[1] != before[1]:
        return False
    if now[2] is before[2]:
        return True
    return now[2] == before[2] and list(map(type, now[2])) == list(map(type, before[2]))


def _encode_or_drop(encoder: Encoder, value: Any) -> Any:
    """Encode a list's items, or whatever else: what cannot be sent is left out as None."""
    if isinstance(value, dict):
        return {str(name): _encode_or_drop(encoder, part) for name, part in value.items()}
    try:
        return encoder.encode(value)
    except (UnsendableError, RecursionError):
        return None
