"""Plain values and calls over a pipe between the judge (the tests) and the player (the program under test).

Both ends are a `Peer`: it calls a function of the other side, and while it waits it serves calls of its own functions,
so that callables and iterators may be passed either way (they stay where they are, and are called back). What a call
changed in the lists, dicts and sets that it was given is written back into the caller's. Frames are bounded in size.
What values may travel, and in what form: sandbox_values.py.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from laguna_serve.evals.sandbox_values import UnsendableError, decode, encode, replace_content

UNREADABLE = (LookupError, TypeError, ValueError, RecursionError, OverflowError)
CONTAINERS = (list, dict, set, bytearray, tuple)
TEXT_CHARS = 500


# The three below must pass through a test's `except Exception`.
class PeerGone(BaseException):
    """The other side ended, or said something that is no message."""


class Unsendable(BaseException):
    """The other side's call gave a value that cannot travel."""


class PeerExit(BaseException):
    """The other side's call raised SystemExit or the like, which must not end this side."""


class Remote:
    """A function of the other side."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.peer, self.number = peer, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.peer.call(self.number, args, kwargs)


class RemoteIterator(Remote):
    """An iterator of the other side: every step is a call."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self()


class Peer:
    """One end of the pipe. `export` makes a function callable from the other end by its number, from 0 on."""

    def __init__(self, fd: int, message_bytes: int) -> None:
        self._fd, self._message_bytes = fd, message_bytes
        self._exported: list[tuple[Any, Callable[..., Any]]] = []

    def export(self, function: Callable[..., Any]) -> None:
        """Give a function the next number."""
        self._exported.append((function, function))

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the other side.

        Raises:
            UnsendableError: an argument cannot be sent.
            Exception: what the function raised, as the nearest builtin exception.
            Unsendable, PeerExit, PeerGone: see there.
        """
        self._send(["call", number, [self._encode(arg) for arg in args], self._encode(kwargs)])
        while True:
            message = self.receive()
            try:
                match message:
                    case ["call", *_]:
                        self._serve(message)
                        continue
                    case ["done", result, list(changes)]:
                        self._write_back(changes, [*args, *kwargs.values()])
                        return self._decode(result)
                    case ["raised", list(names), list(sent)]:
                        error = read_exception([str(name) for name in names], [self._decode(item) for item in sent])
                    case ["unsendable", str(text)]:
                        error = Unsendable(text[:TEXT_CHARS])
                    case _:
                        raise ValueError
            except UNREADABLE as trouble:
                raise PeerGone(f"expected an answer, got {str(message)[:60]}") from trouble
            raise error

    def serve(self) -> None:
        """Serve calls until the other side closes (PeerGone)."""
        while True:
            self._serve(self.receive())

    def say(self, kind: str, text: str) -> None:
        """Send a message that is no call."""
        self._send([kind, text])

    def receive(self) -> list[Any]:
        """The next message: a list that begins with its kind.

        Raises:
            PeerGone: the other side ended or said something else.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > self._message_bytes:
            raise PeerGone(f"expected a message of at most {self._message_bytes} bytes, got one of {size}")
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError, MemoryError) as error:
            raise PeerGone(f"expected a message, got bytes that are none ({type(error).__name__})") from error
        if not isinstance(message, list):
            raise PeerGone(f"expected a message, got a {type(message).__name__}")
        return message

    def _serve(self, message: list[Any]) -> None:
        """Run one of our functions for the other side, and answer."""
        try:
            kind, number, sent, sent_named = message
            args, named = [self._decode(item) for item in sent], self._decode(sent_named)
            if kind != "call" or number < 0:
                raise ValueError
            function = self._exported[number][1]
            before = [*sent, *(item for _, item in sent_named[1:])]
        except UNREADABLE as error:
            raise PeerGone(f"expected a call, got {str(message)[:60]}") from error
        try:
            result = self._encode(function(*args, **named))
            self._send(["done", result, self._list_changes([*args, *named.values()], before)])
        except PeerGone:
            raise
        except UnsendableError as error:
            self._send(["unsendable", str(error)])
        except BaseException as error:
            self._send(["raised", [kind.__name__ for kind in type(error).__mro__], self._describe(error)])

    def _list_changes(self, values: list[Any], before: list[Any]) -> list[Any]:
        """What each argument is now, None where it is as it was sent."""
        after = [self._encode(v) if type(v) in CONTAINERS else None for v in values]
        return [None if now == sent else now for now, sent in zip(after, before, strict=True)]

    def _write_back(self, changes: list[Any], values: list[Any]) -> None:
        for change, value in zip(changes, values, strict=True):
            if change is not None:
                replace_content(value, self._decode(change))

    def _describe(self, error: BaseException) -> list[Any]:
        """An exception's arguments, or its text where they cannot be sent."""
        try:
            return [self._encode(arg) for arg in error.args]
        except Exception:
            try:
                return [str(error)[:TEXT_CHARS]]
            except Exception:
                return []

    def _encode(self, value: Any) -> Any:
        return encode(value, self._encode_reference)

    def _decode(self, item: Any) -> Any:
        return decode(item, self._decode_reference)

    def _encode_reference(self, value: Any) -> Any:
        """A callable or an iterator, as a number; None for anything else."""
        if isinstance(value, Remote) and value.peer is self:
            return ["yours", value.number]
        if hasattr(type(value), "__next__"):
            self._exported.append((value, value.__next__))
            return ["iterator", len(self._exported) - 1]
        if callable(value) and not isinstance(value, type):
            self.export(value)
            return ["function", len(self._exported) - 1]
        return None

    def _decode_reference(self, tag: str, number: int) -> Any:
        if tag == "yours":
            return self._exported[number][0]
        return {"function": Remote, "iterator": RemoteIterator}[tag](self, int(number))

    def _send(self, message: list[Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > self._message_bytes:
            raise UnsendableError(f"expected a value of at most {self._message_bytes} bytes, got {len(data)}")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise PeerGone("the other side has ended") from error

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        try:
            while len(parts) < size:
                part = os.read(self._fd, min(size - len(parts), 1 << 20))
                if not part:
                    raise PeerGone("the other side has ended")
                parts += part
        except OSError as error:
            raise PeerGone("the other side has ended") from error
        return bytes(parts)


def read_exception(names: list[str], args: list[Any]) -> BaseException:
    """An exception of the other side, by the names of its class and bases and its arguments, as the first of them that
    is a builtin; its text is kept. One that is no Exception becomes a PeerExit."""
    said = ": ".join([names[0], *(str(arg)[:TEXT_CHARS] for arg in args if isinstance(arg, str | int | float))])
    for kind in (getattr(builtins, name, None) for name in names):
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*args) if kind.__name__ == names[0] else kind(said)
            except TypeError:  # UnicodeDecodeError and its like want five arguments
                return RuntimeError(said)
    return PeerExit(said)
