"""Many things to do against an endpoint, so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from laguna_serve.serving.kit.progress import say

Item = TypeVar("Item")
# After so long without an end of anything a line says so, and again after twice as long.
QUIET_S = 60.0


async def run_closed_loop(
    items: Iterable[Item],
    concurrency: int,
    work: Callable[[Item], Awaitable[None]],
    say: Callable[[str], None] = say,
    heard: Callable[[], int] = lambda: 0,
) -> None:
    """Work on the items in order, `concurrency` at a time, the next as soon as one ends.

    What `work` raises ends it: the others that are in flight are broken off. Where none ends for long, as of an
    endpoint that hangs, `say` gets a line; `heard` counts what else shows that it lives, as parts of answers.
    """
    waiting = iter(items)
    ended = 0

    async def take() -> None:
        nonlocal ended
        for item in waiting:
            await work(item)
            ended += 1

    async def watch() -> None:
        before, quiet, due = heard(), 0.0, QUIET_S
        while True:
            await asyncio.sleep(QUIET_S)
            now = ended + heard()
            before, quiet, due = (before, quiet + QUIET_S, due) if now == before else (now, 0.0, QUIET_S)
            if quiet and quiet >= due:
                due *= 2
                say(f"no answer for {quiet:.0f} s; {sum(not worker.done() for worker in workers)} requests in flight")

    workers = [asyncio.create_task(take()) for _ in range(concurrency)]
    watcher = asyncio.create_task(watch())
    try:
        await asyncio.gather(*workers)
    finally:
        for task in (*workers, watcher):
            task.cancel()
        await asyncio.gather(*workers, watcher, return_exceptions=True)
