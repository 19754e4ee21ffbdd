"""What the processes of a gateway inherit from the one that starts them, and what each makes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.counts.bells import Bells
from laguna_serve.serving.gateway.counts.board import Board, find_rows
from laguna_serve.serving.gateway.counts.rows import list_rows
from laguna_serve.serving.gateway.counts.shared import SharedCounts
from laguna_serve.serving.gateway.workers.peers import Answers, Peers

# How often those who wait look without having been rung for: a worker may die that was to ring.
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Team:
    """The board with all counts, the bells, and the sockets for questions."""

    board: Board
    bells: Bells
    peers: Peers

    @property
    def size(self) -> int:
        """How many workers there are."""
        return self.board.workers

    def check_room(self, config: Config) -> None:
        """Check that there is room to count for a configuration. Raises BoardFullError."""
        self.board.check_room(list_rows(config))

    def join(self, worker: int) -> None:
        """Be one of them, in a process that was forked for it."""
        self.board.worker = self.peers.worker = worker

    def make_counts(self) -> SharedCounts:
        """Make what counts requests of all workers."""
        return SharedCounts(self.board, self.bells)

    @contextlib.asynccontextmanager
    async def work(self, counts: SharedCounts, answers: Answers) -> AsyncIterator[None]:
        """Answer questions, and let those who wait look when they are rung for, and now and then."""
        async with self.peers.serve(answers):
            with self.bells.listen(self.board.worker, counts.look):
                looking = asyncio.create_task(_look_now_and_then(counts.look))
                try:
                    yield
                finally:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)


async def _look_now_and_then(look: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        look()


@contextlib.contextmanager
def open_team(workers: int, config: Config) -> Iterator[Team]:
    """Open what so many workers share, for as long as the block runs, with room for the configuration and others."""
    with (
        contextlib.closing(Board(workers, find_rows(len(list_rows(config))))) as board,
        contextlib.closing(Bells(workers)) as bells,
        contextlib.closing(Peers(workers)) as peers,
    ):
        yield Team(board, bells, peers)
