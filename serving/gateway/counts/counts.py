"""Makes what counts requests: pools with their slots and queues, keys with their limits, bodies that wait."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.holder import Clock, Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.config.tables import Limits, Model
from laguna_serve.serving.gateway.counts.backlog import Backlog
from laguna_serve.serving.gateway.engines.pool import Pool


class Counts:
    """For a gateway that is one process."""

    def make_backlog(self, most: int) -> Backlog:
        """Make the count of bytes of bodies."""
        return Backlog(most)

    def make_pool(self, model: Model, limits: Limits) -> Pool:
        """Make the pool of a model."""
        return Pool(model, limits)

    def make_holder(self, key: Key, ledger: Ledger, clock: Clock, wall: Clock) -> Holder:
        """Make a key's counts."""
        return Holder(key, ledger, clock, wall)
