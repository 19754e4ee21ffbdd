"""A replica, much simplified: a number of places, prompts computed one at a time, a cache that drops the oldest.

The cache has prompts' blocks alone, not those of answers, as vLLM's has: the next turn computes its last answer again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from laguna_serve.bench.routing.chats import BLOCK_TOKENS, Request


@dataclass(frozen=True)
class Machine:
    """What a replica can do.

    Attributes:
        places: requests that are decoded at once.
        prefill_per_s: prompt tokens that are computed in a second, of one prompt after the other.
        decode_s: seconds for a token of an answer, however many are decoded.
        cache_tokens: that the prefix cache holds.
    """

    places: int = 32
    prefill_per_s: float = 8_000.0
    decode_s: float = 0.02
    cache_tokens: int = 262_144


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request: tokens that the cache had, seconds to its first token."""

    cached_tokens: int
    first_s: float


class Replica:
    """One replica in time: `serve` takes requests in the order in which they come."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._free = [0.0] * machine.places
        self._prefill_free = 0.0
        self._ends: list[float] = []
        self._cache: OrderedDict[int, None] = OrderedDict()
        self.busy_s = 0.0

    @property
    def in_flight(self) -> int:
        """Requests that it has, at the time of the last `advance`."""
        return len(self._ends)

    def advance(self, now_s: float) -> None:
        """End the requests whose time has come."""
        while self._ends and self._ends[0] <= now_s:
            heapq.heappop(self._ends)

    def serve(self, request: Request) -> Served:
        """Take a request at its time; what it will have cost is known at once, as nothing overtakes."""
        cached = self._take_blocks(request.blocks)
        prefill_s = (request.prompt_tokens - cached) / self._machine.prefill_per_s
        begins_s = max(request.at_s, heapq.heappop(self._free), self._prefill_free)
        self._prefill_free = first_s = begins_s + prefill_s
        ends_s = first_s + request.answer_tokens * self._machine.decode_s
        heapq.heappush(self._free, ends_s)
        heapq.heappush(self._ends, ends_s)
        self.busy_s += prefill_s
        return Served(cached, first_s - request.at_s)

    def _take_blocks(self, blocks: tuple[int, ...]) -> int:
        hits = 0
        for block in blocks:
            if block not in self._cache:
                break
            hits += 1
        for block in reversed(blocks):  # the end of a prompt goes first, as in vLLM
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self._machine.cache_tokens // BLOCK_TOKENS:
            self._cache.popitem(last=False)
        return hits * BLOCK_TOKENS
