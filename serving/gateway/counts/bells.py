"""How a process of a gateway lets another one know that somebody who waits there may look again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

RING = b"!"
READ_BYTES = 64


class Bell(NamedTuple):
    """A pair of sockets: what is written to `pull` is read from `rings`, by one worker alone."""

    pull: socket.socket
    rings: socket.socket


class Bells:
    """One for every worker, inherited by all of them."""

    def __init__(self, workers: int) -> None:
        self._bells = [Bell(*socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in range(workers)]
        for end in (end for bell in self._bells for end in bell):
            end.setblocking(False)

    def close(self) -> None:
        """Let the sockets go, in this process."""
        for end in (end for bell in self._bells for end in bell):
            end.close()

    def ring(self, worker: int) -> None:
        """Wake a worker. One that has been rung for so often that nothing more fits is about to wake anyway."""
        with contextlib.suppress(OSError):
            self._bells[worker].pull.send(RING)

    @contextlib.contextmanager
    def listen(self, worker: int, act: Callable[[], None]) -> Iterator[None]:
        """Call `act` in the running loop whenever this worker is rung for, while the block runs; for several once."""
        bell, loop = self._bells[worker].rings, asyncio.get_running_loop()

        def answer() -> None:
            with contextlib.suppress(BlockingIOError):
                while bell.recv(READ_BYTES):
                    pass
            act()

        loop.add_reader(bell, answer)
        try:
            yield
        finally:
            loop.remove_reader(bell)
