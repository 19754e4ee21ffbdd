"""Messages between the two ends: JSON lists in frames of a bounded size, and how their exchange may end."""

from __future__ import annotations

import json
import os
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import UnsendableError


# The three below must pass through a test's `except Exception`.
class PeerGone(BaseException):
    """The other side ended, or said something that is no message."""


class Unsendable(BaseException):
    """A value or an operation that cannot cross: nothing can be said about it."""


class PeerExit(BaseException):
    """The other side's call raised SystemExit or the like, which must not end this side."""


class Pipe:
    """One end of a pipe: messages in and out of one descriptor."""

    def __init__(self, fd: int, message_bytes: int) -> None:
        self._fd, self._message_bytes = fd, message_bytes

    def receive(self) -> list[Any]:
        """Receive the next message: a list that begins with its kind.

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
        if not isinstance(message, list) or not message:
            raise PeerGone(f"expected a message, got a {type(message).__name__}")
        return message

    def send(self, message: list[Any]) -> None:
        """Send one.

        Raises:
            UnsendableError: it is too large.
            PeerGone: the other side has ended.
        """
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
