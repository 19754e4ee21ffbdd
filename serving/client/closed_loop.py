"""Many things to do against an endpoint, so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


async def run_closed_loop(items: Iterable[Item], concurrency: int, work: Callable[[Item], Awaitable[None]]) -> None:
    """Work on the items in order, `concurrency` at a time, the next as soon as one ends.

    What `work` raises ends it: the others that are in flight are broken off.
    """
    waiting = iter(items)

    async def take() -> None:
        for item in waiting:
            await work(item)

    workers = [asyncio.create_task(take()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
