"""Cuts down what was found: fewer requests, then fewer parameters, as long as the same is still wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from laguna_serve.bench.fuzzing.requests import BASES, Request


async def minimise(
    batch: list[Request], persists: Callable[[list[Request]], Awaitable[bool]], *, most: int
) -> list[Request]:
    """Return the smallest batch found in at most `most` attempts.

    `persists` says whether a smaller one shows the same.
    """
    attempts = 0
    reduced = True
    while reduced:
        reduced = False
        for smaller in list_smaller(batch):
            if attempts == most:
                return batch
            attempts += 1
            if await persists(smaller):
                batch, reduced = smaller, True
                break
    return batch


def list_smaller(batch: list[Request]) -> Iterator[list[Request]]:
    """Each request alone, the halves, all but one; then every request without one of its parameters."""
    if len(batch) > 1:
        yield from ([request] for request in batch)
        half = len(batch) // 2
        if half > 1:
            yield from (batch[:half], batch[half:])
        if len(batch) > 2:
            yield from (batch[:place] + batch[place + 1 :] for place in range(len(batch)))
    for place, request in enumerate(batch):
        if not isinstance(request.body, dict):
            continue
        kept = {"model", *BASES.get(request.route, {})}
        for name in request.body:
            if name not in kept:
                body = {key: value for key, value in request.body.items() if key != name}
                yield [*batch[:place], replace(request, body=body), *batch[place + 1 :]]
