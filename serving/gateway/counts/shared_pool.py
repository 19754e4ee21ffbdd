"""A model's engines, whose slots and whose queue several processes fill."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator

from laguna_serve.serving.gateway.config.tables import Limits, Model
from laguna_serve.serving.gateway.counts.bells import Bells
from laguna_serve.serving.gateway.counts.board import Board
from laguna_serve.serving.gateway.counts.rows import name_engine, name_model
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.waiting import Ticket, WaitingLine
from laguna_serve.serving.gateway.engines.weight_policy import WeightPolicy

# For how long a free slot is left to the first one of another process.
POLITE_S = 1.0
# A model's row: the number that was drawn last. And of each worker: how many wait there, the first of them by priority
# and number, which is 0 without one, and how many of them are limited.
LAST = 0
WAITING, PRIORITY, NUMBER, LIMITED = 0, 1, 2, 3
# An engine's row, of each worker: what it has in flight there.
IN_FLIGHT = 0


class SharedLine(WaitingLine):
    """Those who wait in this process; the others see how many they are, and which is the first one of any slot."""

    def __init__(self, board: Board, row: int) -> None:
        super().__init__()
        self._board, self._row, self._own = board, row, board.find_own(row)
        self._others = [(board.find_place(row, w), w) for w in range(board.workers) if w != board.worker]
        self._first: list[Ticket] = []  # in order; those that are limited are not among them

    def __bool__(self) -> bool:
        """Whether somebody may be woken, in any process."""
        return super().__bool__() or any(self._board.numbers[place + WAITING] for place, _ in self._others)

    @property
    def total(self) -> int:
        """How many wait in all processes."""
        return self.length + self._sum_elsewhere(WAITING)

    def count(self, *, limited: bool) -> int:
        """Count those who wait in all processes and are limited, or are not."""
        all_limited = self.limited + self._sum_elsewhere(LIMITED)
        return all_limited if limited else self.total - all_limited

    @property
    def first(self) -> Ticket | None:
        """The first one of this process."""
        return self._first[0] if self._first else None

    def find_elsewhere(self) -> tuple[Ticket, int] | None:
        """Find the first one of the other processes, and whose it is."""
        return min(self._list_elsewhere(), default=None)

    @contextlib.contextmanager
    def draw(self, priority: int, *, limited: bool) -> Iterator[Ticket]:
        """Give a place at the end of those of a priority, in all processes, for as long as the block runs."""
        with self._board.locked():
            self._board.numbers[self._row + LAST] += 1
            ticket = (priority, int(self._board.numbers[self._row + LAST]))
        try:
            with super().draw(priority, limited=limited):
                if not limited:
                    bisect.insort(self._first, ticket)
                try:
                    self._show()
                    yield ticket
                finally:
                    if not limited:
                        del self._first[bisect.bisect_left(self._first, ticket)]
        finally:
            self._show()

    def _show(self) -> None:
        numbers, own = self._board.numbers, self._own
        with self._board.locked():
            numbers[own + WAITING], numbers[own + LIMITED] = self.length, self.limited
            numbers[own + PRIORITY], numbers[own + NUMBER] = self.first or (0, 0)

    def _sum_elsewhere(self, number: int) -> int:
        return int(sum(self._board.numbers[place + number] for place, _ in self._others))

    def _list_elsewhere(self) -> Iterator[tuple[Ticket, int]]:
        numbers = self._board.numbers
        for place, worker in self._others:
            if number := int(numbers[place + NUMBER]):
                yield (int(numbers[place + PRIORITY]), number), worker


class SharedPool(Pool):
    """As in one process, with what the others have in flight, and those who wait there.

    Whether engines are well each process finds out by itself. So the first one of another process may not see the slot
    that is free here, or its process may hang: it is let past for `POLITE_S`, and no longer.
    """

    keeps_renamed = False  # its row on the board has its name
    _line: SharedLine

    def __init__(self, model: Model, limits: Limits, board: Board, bells: Bells) -> None:
        super().__init__(model, limits)
        self._board, self._bells = board, bells
        self._line = SharedLine(board, board.find_row(name_model(model.name)))
        self._rows: dict[str, int] = {}
        # The first of another process that a free slot is left to, and since when.
        self._let_past: tuple[Ticket | None, float] = (None, 0.0)

    @property
    def queued(self) -> int:
        """Requests that wait for a slot, in all processes."""
        return self._line.total

    def take(
        self,
        affinity: bytes | None,
        avoid: frozenset[Engine] = frozenset(),
        *,
        ticket: Ticket | None = None,
        policy: WeightPolicy | None = None,
    ) -> Engine | None:
        """Take a slot of an engine, where one is free and nobody was before, in any process."""
        with self._together(self.engines):
            return super().take(affinity, avoid, ticket=ticket, policy=policy)

    async def acquire(
        self,
        affinity: bytes | None,
        avoid: frozenset[Engine] = frozenset(),
        deadline: float | None = None,
        priority: int = 0,
        policy: WeightPolicy | None = None,
    ) -> Engine:
        """`take`, after a wait in the queue where it must be. Raises GatewayError."""
        try:
            return await super().acquire(affinity, avoid, deadline, priority, policy)
        finally:
            self.wake()  # there may be more room, for one who waits elsewhere

    def release(self, engine: Engine) -> None:
        """Give a slot back; the first in the queue is woken, in whatever process."""
        with self._together((engine,)):
            engine.in_flight -= 1
        engine.note_drained()
        self.wake()

    def refresh(self) -> None:
        """Look what the engines have in flight from all processes."""
        with self._together(self.engines):
            pass

    def wake(self) -> None:
        """Let the first in the queue look again, in whatever process it waits."""
        first, elsewhere = self._line.first, self._line.find_elsewhere()
        if elsewhere is not None and (first is None or elsewhere[0] < first):
            self._bells.ring(elsewhere[1])
            if first is not None:
                return
        super().wake()

    def look(self) -> None:
        """Let the first of this process look: it was rung for, or has waited for a while."""
        self._line.wake()

    def _must_nudge(self, limited: bool) -> bool:
        """Say yes: a slot may have come free elsewhere since this one looked, and before it was seen to wait."""
        return True

    def _is_behind(self, ticket: Ticket | None) -> bool:
        if super()._is_behind(ticket):
            return True
        if ticket is not None and self._line.first is not None and self._line.first < ticket:
            return True  # both were woken, and the first one looked before another process gave its slot back
        elsewhere = self._line.find_elsewhere()
        if elsewhere is None or (ticket is not None and ticket < elsewhere[0]):
            return False
        first, worker = elsewhere
        now = self.clock()
        if not any(engine.is_up(now) and engine.has_slot() for engine in self.engines):
            self._let_past = (None, 0.0)
        elif self._let_past[0] != first:
            self._let_past = (first, now)
            self._bells.ring(worker)
        elif now - self._let_past[1] > POLITE_S:
            return False
        return True

    @contextlib.contextmanager
    def _together(self, engines: Iterable[Engine]) -> Iterator[None]:
        """Have what engines have in flight from all processes, and let nobody else change it while the block runs."""
        board, numbers = self._board, self._board.numbers
        rows = [(engine, self._find_row(engine)) for engine in engines]
        with board.locked():
            loaded = []
            for engine, row in rows:
                own = board.find_own(row) + IN_FLIGHT
                others = int(sum(numbers[place + IN_FLIGHT] for place in board.list_others(row)))
                engine.in_flight = int(numbers[own]) + others
                loaded.append((engine, own, others))
            try:
                yield
            finally:
                for engine, own, others in loaded:
                    numbers[own] = engine.in_flight - others

    def _find_row(self, engine: Engine) -> int:
        name = name_engine(engine.name, engine.config.url)
        if (row := self._rows.get(name)) is None:
            row = self._rows[name] = self._board.find_row(name)
        return row
