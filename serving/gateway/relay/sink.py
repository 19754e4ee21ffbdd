"""Where an answer goes, whatever server the client is connected to."""

from __future__ import annotations

from typing import Protocol

from laguna_serve.serving.gateway.wire.headers import Head, Headers, read_length

# So much of the body of a request that was refused is read and dropped; of more, the connection is closed.
MAX_DROPPED_BYTES = 64 * 1024


class Sink(Protocol):
    """The connection of a client, as far as an exchange writes to it."""

    def start(self, status: int, headers: Headers) -> None:
        """Start with the head; names in lower case."""

    def write(self, data: bytes) -> None:
        """Write a chunk of the body."""

    def flush(self) -> None:
        """Nothing more for now: what was written is to be sent."""

    def end(self) -> None:
        """End the body, which is complete."""

    def cut(self) -> None:
        """Close the connection in the middle: the body is short of its length, or of what its encoding needs."""


def has_body(head: Head) -> bool:
    """Whether the head says that a body follows."""
    return b"transfer-encoding" in head.named or read_length(head.named) != 0


def can_stay_open(head: Head) -> bool:
    """Whether the connection may be kept though the body of this request was not awaited.

    Not with a client that waits to be asked for it, nor where its end cannot be foreseen.
    """
    if b"transfer-encoding" in head.named or b"expect" in head.named:
        return False
    length = read_length(head.named)
    return length is not None and length <= MAX_DROPPED_BYTES
