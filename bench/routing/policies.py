"""Which replica gets a request: what routers do, each on what it can know."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from laguna_serve.bench.routing.chats import Request
from laguna_serve.bench.routing.replicas import Replica

Policy = Callable[[Request, Sequence[Replica]], int]
# As Ray's prefix router is set up in serving/ray_app.py: load goes first beyond so many requests of difference.
IMBALANCE, LEAST_MATCH = 16, 0.1


def make_random(rng: random.Random) -> Policy:
    """Take any of them, drawn evenly."""
    return lambda _request, replicas: rng.randrange(len(replicas))


def make_round_robin(rng: random.Random) -> Policy:
    """Take one after the other."""
    turn = rng.randrange(1 << 16)

    def choose(_request: Request, replicas: Sequence[Replica]) -> int:
        nonlocal turn
        turn += 1
        return turn % len(replicas)

    return choose


def make_least_loaded(rng: random.Random) -> Policy:
    """Take one of those with the fewest requests in flight."""

    def choose(_request: Request, replicas: Sequence[Replica]) -> int:
        least = min(replica.in_flight for replica in replicas)
        return rng.choice([at for at, replica in enumerate(replicas) if replica.in_flight == least])

    return choose


def make_power_of_two(rng: random.Random) -> Policy:
    """Take the less loaded of two that are drawn."""

    def choose(_request: Request, replicas: Sequence[Replica]) -> int:
        drawn = rng.sample(range(len(replicas)), min(2, len(replicas)))
        return min(drawn, key=lambda at: replicas[at].in_flight)

    return choose


def make_prefix(rng: random.Random) -> Policy:
    """Take the one that was sent the longest beginning of the prompt, while loads are alike; else the last policy.

    Where less than a tenth of the prompt is known anywhere, the replica that was sent the least gets it. The router
    knows what it has sent, not what the caches still hold.
    """
    sent: dict[int, set[int]] = {}
    amounts: dict[int, int] = {}
    fallback = make_power_of_two(rng)

    def choose(request: Request, replicas: Sequence[Replica]) -> int:
        loads = [replica.in_flight for replica in replicas]
        chosen = None
        if max(loads) - min(loads) <= IMBALANCE:
            matched, holders = 0, set(range(len(replicas)))
            for block in request.blocks:
                if not (deeper := holders & sent.get(block, set())):
                    break
                matched, holders = matched + 1, deeper
            if matched < LEAST_MATCH * len(request.blocks):
                least = min(amounts.get(at, 0) for at in range(len(replicas)))
                holders = {at for at in range(len(replicas)) if amounts.get(at, 0) == least}
            chosen = min(sorted(holders), key=loads.__getitem__)
        at = fallback(request, replicas) if chosen is None else chosen
        for block in request.blocks:
            sent.setdefault(block, set()).add(at)
        amounts[at] = amounts.get(at, 0) + len(request.blocks)
        return at

    return choose


POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "random": make_random,
    "round-robin": make_round_robin,
    "least-loaded": make_least_loaded,
    "power-of-two": make_power_of_two,
    "prefix-aware": make_prefix,
}
