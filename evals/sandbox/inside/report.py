"""What the grader tells the host: messages that nobody else can write.

Every message is a line: a keyed hash of its number and its text, then the text. The key is the trial's own and known to
the grader alone, so that a line by anyone else who reaches the channel, or one sent twice or left out, is recognised.
"""

from __future__ import annotations

from hashlib import blake2s

KEY_BYTES, TAG_BYTES = 32, 16


class ForgedError(ValueError):
    """A line that the grader has not written."""


class Seal:
    """One end's count of messages, and the key."""

    def __init__(self, key: bytes) -> None:
        self._key, self._number = key, 0

    def close(self, text: bytes) -> bytes:
        """Make the line of the next message, which holds no line break."""
        return self._next_tag(text) + b" " + text + b"\n"

    def open(self, line: bytes) -> bytes:
        """Read the next message's text from its line without the break.

        Raises:
            ForgedError: the line is not the grader's.
        """
        tag, _, text = line.partition(b" ")
        if tag != self._next_tag(text):
            raise ForgedError(f"expected a line by the grader, got {line[:60]!r}")
        return text

    def _next_tag(self, text: bytes) -> bytes:
        self._number += 1
        counted = self._number.to_bytes(8, "big") + text
        return blake2s(counted, key=self._key, digest_size=TAG_BYTES).hexdigest().encode()
