"""A key whose limits count over several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from laguna_serve.serving.gateway.access.demand import Demand
from laguna_serve.serving.gateway.access.holder import Claim, Clock, Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.access.limits import Bucket
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.counts.board import Board
from laguna_serve.serving.gateway.counts.rows import name_key
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
        self._board, self._row = board, board.find_row(name_key(key.name))
        self._own, self._others = board.find_own(self._row), board.list_others(self._row)
        super().__init__(key, ledger, clock, wall)

    def configure(self, key: Key) -> None:
        """Take the key's limits; what has been used of one that stays is still used."""
        super().configure(key)
        with self._together(configuring=True):
            pass

    def enter(self) -> Claim:
        """Take a place in flight, and one of this minute's requests. Raises GatewayError: 429."""
        with self._together():
            return super().enter()

    def reserve(self, claim: Claim, model: str, demand: Demand) -> None:
        """Take the tokens that a request for a model may cost, until it ends. Raises GatewayError: 429."""
        with self._together():
            super().reserve(claim, model, demand)

    def leave(self, claim: Claim, used: Demand | None) -> None:
        """Give back the place, and settle the tokens."""
        with self._together():
            super().leave(claim, used)

    def render_limits(self) -> Headers:
        """Render the headers that tell what is left."""
        self.refresh()
        return super().render_limits()

    def refresh(self) -> None:
        """Take over what the others have done meanwhile."""
        with self._together():
            pass

    @contextlib.contextmanager
    def _together(self, *, configuring: bool = False) -> Iterator[None]:
        """Have what counts in all processes, and let nobody else change it while the block runs."""
        numbers, row, own, budget = self._board.numbers, self._row, self._own, self._budget
        with self._board.locked():
            in_flight, reserved = (
                int(sum(numbers[other + i] for other in self._others)) for i in (IN_FLIGHT, RESERVED)
            )
            self.in_flight = int(numbers[own + IN_FLIGHT]) + in_flight
            budget.reserved = int(numbers[own + RESERVED]) + reserved
            if (day := int(numbers[row + DAY])) >= budget.day:
                if day != budget.day:
                    self._tallies.clear()
                budget.day, budget.used = day, int(numbers[row + USED])
            buckets = [(self._requests, row + REQUESTS), (self._tokens, row + TOKENS)]
            shared = [(bucket, place) for bucket, place in buckets if bucket is not None]
            for bucket, place in shared:
                self._load_bucket(bucket, place)
            try:
                yield
            finally:
                numbers[own + IN_FLIGHT] = self.in_flight - in_flight
                numbers[own + RESERVED] = budget.reserved - reserved
                numbers[row + DAY], numbers[row + USED] = budget.day, budget.used
                for bucket, place in shared:
                    if configuring or numbers[place] == bucket.per_minute:
                        self._store_bucket(bucket, place)

    def _load_bucket(self, bucket: Bucket, place: int) -> None:
        """Take over a bucket of the same size; one of another is of another configuration, and is left alone."""
        per_minute, left, filled_s = self._board.numbers[place : place + 3]
        if bucket.per_minute == per_minute:
            bucket.left, bucket.filled_s = left, filled_s

    def _store_bucket(self, bucket: Bucket, place: int) -> None:
        numbers = self._board.numbers
        numbers[place], numbers[place + 1], numbers[place + 2] = bucket.per_minute, bucket.left, bucket.filled_s
