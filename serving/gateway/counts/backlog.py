"""How many bytes of requests are in the gateway's memory and with no engine yet.

Those are bodies that arrive, and those that wait for a slot. Requests differ a thousandfold in size, so that a queue
bounded by count alone is no bound on memory.
"""

from __future__ import annotations

from typing import Protocol

from laguna_serve.serving.gateway.wire import errors


class Holding(Protocol):
    """What has a body; `held` are its bytes that are counted."""

    held: int


class Backlog:
    """The bytes of all bodies, at most `most`."""

    __slots__ = ("_own", "most")

    def __init__(self, most: int) -> None:
        self.most, self._own = most, 0

    @property
    def total(self) -> int:
        """Bytes of all bodies that are here."""
        return self._own

    def hold(self, holding: Holding, size: int) -> None:
        """Of one body there are so many bytes by now. Raises GatewayError: 429 they are too many, with the others'."""
        self._add(size - holding.held)
        holding.held = size
        if self.total > self.most:
            raise errors.queue_bytes_full()

    def check(self, announced: int) -> None:
        """Check that a body of this size may come, by what there is now. Raises GatewayError as `hold`."""
        if self.total + announced > self.most:
            raise errors.queue_bytes_full()

    def release(self, holding: Holding) -> None:
        """Release a body that has gone to an engine, or will not go to any."""
        self._add(-holding.held)
        holding.held = 0

    def _add(self, size: int) -> None:
        self._own += size
