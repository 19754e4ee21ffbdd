"""Counts of a gateway that is several processes: on a board that all of them see."""

from __future__ import annotations

import weakref

from laguna_serve.serving.gateway.access.holder import Clock, Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.config.tables import Limits, Model
from laguna_serve.serving.gateway.counts.backlog import Backlog
from laguna_serve.serving.gateway.counts.bells import Bells
from laguna_serve.serving.gateway.counts.board import Board
from laguna_serve.serving.gateway.counts.counts import Counts
from laguna_serve.serving.gateway.counts.rows import BACKLOG
from laguna_serve.serving.gateway.counts.shared_holder import SharedHolder
from laguna_serve.serving.gateway.counts.shared_pool import SharedPool
from laguna_serve.serving.gateway.engines.pool import Pool


class SharedCounts(Counts):
    """For one of several processes. `bells` wake those who wait in the others."""

    def __init__(self, board: Board, bells: Bells) -> None:
        self._board, self._bells = board, bells
        self._pools = weakref.WeakValueDictionary[str, SharedPool]()

    def look(self) -> None:
        """Let the first one of each pool look, also of one that is in the configuration no more."""
        for pool in list(self._pools.values()):
            pool.look()

    def make_backlog(self, most: int) -> Backlog:
        """Make the count of bytes of bodies, in all processes."""
        return SharedBacklog(most, self._board)

    def make_pool(self, model: Model, limits: Limits) -> Pool:
        """Make the pool of a model, whose slots and whose queue all processes fill.

        It is the one from before, if the model was taken out and requests still wait there.
        """
        if (pool := self._pools.get(model.name)) is None:
            pool = self._pools[model.name] = SharedPool(model, limits, self._board, self._bells)
        return pool

    def make_holder(self, key: Key, ledger: Ledger, clock: Clock, wall: Clock) -> Holder:
        """Make a key's counts, of what is asked of all processes."""
        return SharedHolder(key, ledger, clock, wall, self._board)


class SharedBacklog(Backlog):
    """The bytes of all bodies, in all processes. Others are looked at without a lock: each number is one's own."""

    __slots__ = ("_board", "_others", "_place")

    def __init__(self, most: int, board: Board) -> None:
        super().__init__(most)
        row = board.find_row(BACKLOG)
        self._board, self._place, self._others = board, board.find_own(row), board.list_others(row)

    @property
    def total(self) -> int:
        """Bytes of all bodies that are in a process of this gateway."""
        numbers = self._board.numbers
        return self._own + int(sum(numbers[place] for place in self._others))

    def _add(self, size: int) -> None:
        super()._add(size)
        self._board.numbers[self._place] = self._own
