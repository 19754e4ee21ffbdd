"""A key whose limits count over several processes."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.demand import Demand
from laguna_serve.serving.gateway.access.holder import Claim, Clock, Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.access.limits import Bucket
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.counts.board import Board
from laguna_serve.serving.gateway.wire.headers import Headers

# Numbers of a row that all write: of the day its number (the epoch's is no day of ours) and what is used of it, of each
# bucket its size, what is left, and when it was filled.
DAY, USED, REQUESTS, TOKENS = 0, 1, 2, 5
# And each worker's own.
IN_FLIGHT, RESERVED = 0, 1


class SharedHolder(Holder):
    """As in one process: what the board has is taken over before anything is asked, and put back after it.

    `since_start` is this process's alone.
    """

    def __init__(self, key: Key, ledger: Ledger, clock: Clock, wall: Clock, board: Board) -> None:
        self._board, self._row = board, board.find_row(f"key {key.name}")
        self._own, self._others = board.find_own(self._row), board.list_others(self._row)
        super().__init__(key, ledger, clock, wall)

    def configure(self, key: Key) -> None:
        """Take the key's limits; what has been used of one that stays is still used."""
        super().configure(key)
        self.refresh()

    def enter(self) -> Claim:
        """Take a place in flight, and one of this minute's requests. Raises GatewayError: 429."""
        self._load()
        try:
            return super().enter()
        finally:
            self._store()

    def reserve(self, claim: Claim, model: str, demand: Demand) -> None:
        """Take the tokens that a request for a model may cost, until it ends. Raises GatewayError: 429."""
        self._load()
        try:
            super().reserve(claim, model, demand)
        finally:
            self._store()

    def leave(self, claim: Claim, used: Demand | None) -> None:
        """Give back the place, and settle the tokens."""
        self._load()
        try:
            super().leave(claim, used)
        finally:
            self._store()

    def render_limits(self) -> Headers:
        """Render the headers that tell what is left."""
        self.refresh()
        return super().render_limits()

    def refresh(self) -> None:
        """Take over what the others have done meanwhile."""
        self._load()
        self._store()

    def _load(self) -> None:
        self._board.lock()
        numbers, row, own, budget = self._board.numbers, self._row, self._own, self._budget
        self._elsewhere = (
            int(sum(numbers[other + IN_FLIGHT] for other in self._others)),
            int(sum(numbers[other + RESERVED] for other in self._others)),
        )
        self.in_flight = int(numbers[own + IN_FLIGHT]) + self._elsewhere[0]
        budget.reserved = int(numbers[own + RESERVED]) + self._elsewhere[1]
        if (day := int(numbers[row + DAY])) >= budget.day:
            if day != budget.day:
                self._tallies.clear()
            budget.day, budget.used = day, int(numbers[row + USED])
        self._load_bucket(self._requests, row + REQUESTS)
        self._load_bucket(self._tokens, row + TOKENS)

    def _store(self) -> None:
        numbers, row, own, budget = self._board.numbers, self._row, self._own, self._budget
        numbers[own + IN_FLIGHT] = self.in_flight - self._elsewhere[0]
        numbers[own + RESERVED] = budget.reserved - self._elsewhere[1]
        numbers[row + DAY], numbers[row + USED] = budget.day, budget.used
        self._store_bucket(self._requests, row + REQUESTS)
        self._store_bucket(self._tokens, row + TOKENS)
        self._board.unlock()

    def _load_bucket(self, bucket: Bucket | None, place: int) -> None:
        """Take over a bucket of the same size: one of another is of another configuration."""
        per_minute, left, filled_s = self._board.numbers[place : place + 3]
        if bucket is not None and bucket.per_minute == per_minute:
            bucket.left, bucket.filled_s = left, filled_s

    def _store_bucket(self, bucket: Bucket | None, place: int) -> None:
        numbers = self._board.numbers
        if bucket is not None:
            numbers[place], numbers[place + 1], numbers[place + 2] = bucket.per_minute, bucket.left, bucket.filled_s
