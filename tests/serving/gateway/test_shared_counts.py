"""What processes share, seen as two of them would: slots, one queue, limits; also where one of them hangs."""

from __future__ import annotations

import asyncio
import copy
import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from laguna_serve.serving.gateway.access.demand import Asked, Demand
from laguna_serve.serving.gateway.access.edits import find_priority
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.config.tables import Limits, Model, Upstream
from laguna_serve.serving.gateway.counts.bells import Bells
from laguna_serve.serving.gateway.counts.board import Board, BoardFullError
from laguna_serve.serving.gateway.counts.shared import SharedCounts
from laguna_serve.serving.gateway.counts.shared_holder import SharedHolder
from laguna_serve.serving.gateway.counts.shared_pool import POLITE_S, SharedPool
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.weight_policy import HEADER, read_policy
from laguna_serve.serving.gateway.wire.errors import GatewayError

LOOK_S = 0.02
DAY_S = 86_400


class Two:
    """The counts of two workers, in one process; those that `run` listen to their bells and look now and then."""

    def __init__(self, board: Board, bells: Bells) -> None:
        self.boards = [board, copy.copy(board)]
        self.boards[1].worker = 1
        self.bells = bells
        self.counts = [SharedCounts(one, bells) for one in self.boards]

    def make_pools(self, model: Model, **limits: Any) -> tuple[SharedPool, SharedPool]:
        found = []
        for counts in self.counts:
            pool = counts.make_pool(model, Limits(**limits))
            pool.configure(model, pool.limits)
            for engine in pool.engines:
                engine.note_well()
            found.append(pool)
        return found[0], found[1]

    def run(self, test: Callable[[], Awaitable[None]], running: tuple[int, ...] = (0, 1)) -> None:
        async def main() -> None:
            async def look(worker: int) -> None:
                with self.bells.listen(worker, self.counts[worker].look):
                    while True:
                        await asyncio.sleep(LOOK_S)
                        self.counts[worker].look()

            looking = [asyncio.create_task(look(worker)) for worker in running]
            try:
                async with asyncio.timeout(5):
                    await test()
            finally:
                for task in looking:
                    task.cancel()
                await asyncio.gather(*looking, return_exceptions=True)

        asyncio.run(main())


@pytest.fixture
def two() -> Iterator[Two]:
    board, bells = Board(2), Bells(2)
    yield Two(board, bells)
    board.close()
    bells.close()


def make_model(**slots: int) -> Model:
    urls = {name: f"http://127.0.0.1:{9000 + i}" for i, name in enumerate(slots)}
    return Model(
        name="m", upstreams=tuple(Upstream(name=name, url=urls[name], max_in_flight=n) for name, n in slots.items())
    )


async def wait_for(pool: Pool, **arguments: Any) -> asyncio.Task[Any]:
    """One who waits in the pool, and has looked."""
    task = asyncio.create_task(pool.acquire(None, **arguments))
    await asyncio.sleep(LOOK_S)
    assert not task.done()
    return task


def test_slots_are_those_of_both(two: Two) -> None:
    a, b = two.make_pools(make_model(e=3))
    taken = [pool.take(None) for pool in (a, b, a)]
    assert (a.take(None), b.take(None)) == (None, None)
    b.refresh()
    assert b.engines[0].in_flight == 3
    b.release(taken[1])  # type: ignore[arg-type]
    assert a.take(None) is a.engines[0]
    assert b.take(None) is None
    two.boards[0].forget(0)
    assert [b.take(None) is not None for _ in range(4)] == [True] * 3 + [False]


def test_one_who_waits_is_served_before_one_who_comes(two: Two) -> None:
    a, b = two.make_pools(make_model(e=1))

    async def test() -> None:
        engine = a.take(None)
        waiting = await wait_for(b)
        assert a.queued == b.queued == 1
        a.release(engine)  # type: ignore[arg-type]
        assert a.take(None) is None, "the slot is free, and another one's"
        await waiting
        assert a.queued == b.queued == 0

    two.run(test)


def test_one_that_looks_too_early_keeps_its_place(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a process are woken at once, and the slot comes free in another one after the first has looked."""
    a, b = two.make_pools(make_model(e=1))

    async def test() -> None:
        engine = b.take(None)
        first, second = await wait_for(a), await wait_for(a)
        take, looks = a.take, []

        def take_and_release(*arguments: Any, **named: Any) -> Any:
            looks.append(named["ticket"])
            found = take(*arguments, **named)
            if len(looks) == 1:
                b.release(engine)  # type: ignore[arg-type]
            return found

        monkeypatch.setattr(a, "take", take_and_release)
        a.look()
        a.look()
        found = await first
        assert looks[:2] == sorted(set(looks)), "the second looked while the slot was free"
        assert not second.done()
        b.release(found)
        await second

    two.run(test)


def test_all_slots_that_come_free_are_filled_at_once(two: Two) -> None:
    a, b = two.make_pools(make_model(e=4))

    async def test() -> None:
        engines = [a.take(None) for _ in range(4)]
        waiting = [await wait_for(pool) for pool in (a, b, b, a)]
        for engine in engines:
            a.release(engine)  # type: ignore[arg-type]
        async with asyncio.timeout(0.5 * LOOK_S):
            await asyncio.gather(*waiting)

    two.run(test)


@pytest.mark.slow
def test_one_in_a_process_that_hangs_is_passed_by(two: Two) -> None:
    a, b = two.make_pools(make_model(e=1))

    async def test() -> None:
        engine = b.take(None)
        stuck, waiting = await wait_for(a), await wait_for(b)
        b.release(engine)  # type: ignore[arg-type]
        async with asyncio.timeout(POLITE_S + 10 * LOOK_S):
            engine = await waiting
        assert not stuck.done()
        b.release(engine)
        async with asyncio.timeout(0.5 * LOOK_S):  # which is known now
            b.release(await b.acquire(None))
        stuck.cancel()

    two.run(test, running=(1,))


@pytest.mark.slow
def test_one_that_sees_no_engine_up_does_not_keep_others_from_it(two: Two) -> None:
    a, b = two.make_pools(make_model(e=1, f=1))
    a.engines[1].leave("gone, as this process sees it")

    async def test() -> None:
        engine = a.take(None)
        assert engine is a.engines[0]
        assert b.take(None) is b.engines[1]
        stuck, waiting = await wait_for(a), await wait_for(b)
        b.release(b.engines[1])
        assert await waiting is b.engines[1]
        assert not stuck.done()
        a.release(engine)
        assert await stuck is engine

    two.run(test)


@pytest.mark.parametrize("kind", ["shared", "alone"])
def test_one_that_avoids_an_engine_leaves_it_to_the_next(two: Two, kind: str) -> None:
    model = make_model(e=1, f=1)
    a, b = two.make_pools(model)
    if kind == "alone":
        a = b = Pool(model, Limits())  # type: ignore[assignment]
        a.configure(model, a.limits)

    async def test() -> None:
        engines = {engine.name: engine for engine in (b.take(None), b.take(None)) if engine}
        first = await wait_for(a, avoid=frozenset(e for e in a.engines if e.name == "e"))
        second = await wait_for(a)
        b.release(engines["e"])
        assert (await second).name == "e"
        assert not first.done()
        b.release(engines["f"])
        assert (await first).name == "f"

    two.run(test)


def test_those_of_a_model_that_is_taken_out_are_served_and_it_may_come_back(two: Two) -> None:
    model = make_model(e=1)
    a, b = two.make_pools(model)

    async def test() -> None:
        nonlocal a, b
        engine = b.take(None)
        waiting = await wait_for(a)
        a.remove()
        b.remove()
        a, b = two.make_pools(model)  # while one still waits in it
        assert not a.engines[0].removed
        last = await wait_for(b)
        b.release(engine)  # type: ignore[arg-type]
        a.release(await waiting)
        await last

    two.run(test)


def test_places_are_given_up_by_those_who_leave(two: Two) -> None:
    a, b = two.make_pools(make_model(e=1), max_queued=2)

    async def test() -> None:
        engine = a.take(None)
        waiting = [await wait_for(a), await wait_for(b, priority=-5)]
        for pool in (a, b):
            with pytest.raises(GatewayError):
                await pool.acquire(None)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert a.queued == b.queued == 0
        a.release(engine)  # type: ignore[arg-type]
        assert b.take(None) is not None

    two.run(test)


def test_those_who_cannot_take_every_slot_are_counted_apart_over_all_processes(two: Two) -> None:
    a, b = two.make_pools(make_model(e=1), max_queued=1)
    policy = read_policy({HEADER: b"latest-only"})

    async def test() -> None:
        for pool in (a, b):
            pool.note_versions_known(pool.engines[0])
        a.take(None)
        waiting = [await wait_for(a, policy=policy), await wait_for(b)]
        for pool in (a, b):
            for more in (None, policy):
                with pytest.raises(GatewayError) as refused:
                    await pool.acquire(None, policy=more)
                assert refused.value.status == 429
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    two.run(test)


def test_a_number_that_is_too_large_is_the_largest() -> None:
    assert find_priority(Asked(priority=10**400), 3) == 1 << 31
    assert find_priority(Asked(priority=-(10**400)), 3) == 3


def make_holders(two: Two, now: list[float], **limits: int) -> list[SharedHolder]:
    key = Key(name="k", sha256="0" * 64, **limits)
    wall = lambda: now[0]  # noqa: E731
    return [SharedHolder(key, Ledger(wall=wall), wall, wall, board) for board in two.boards]


def test_day_turns_for_both(two: Two) -> None:
    now = [5.0 * DAY_S]
    a, b = make_holders(two, now, tokens_per_day=10)
    for holder in (a, b):
        claim = holder.enter()
        holder.reserve(claim, "m", Demand(3, 2))
        holder.leave(claim, Demand(3, 2))
    with pytest.raises(GatewayError):
        a.reserve(a.enter(), "m", Demand(1, 0))
    now[0] += DAY_S
    claim = a.enter()
    a.reserve(claim, "m", Demand(1, 0))
    a.leave(claim, Demand(1, 0))
    b.refresh()
    assert (b.used_today, b.find_today().get("m")) == (1, None)
    b.reserve(b.enter(), "m", Demand(4, 5))
    with pytest.raises(GatewayError):
        a.reserve(a.enter(), "m", Demand(1, 0))


def test_limits_that_a_reload_changes_are_not_given_twice(two: Two) -> None:
    a, b = make_holders(two, [0.0], requests_per_minute=5)
    for holder in (a, b, a, b, a):
        holder.enter()
    new = Key(name="k", sha256="0" * 64, requests_per_minute=3)
    a.configure(new)  # with b still to come
    a.enter()
    b.refresh()
    b.configure(new)
    b.enter()
    a.enter()
    for holder in (a, b):
        with pytest.raises(GatewayError):
            holder.enter()


def test_bytes_of_bodies_are_those_of_both(two: Two) -> None:
    class Body:
        held = 0

    a, b = (counts.make_backlog(100) for counts in two.counts)
    bodies = Body(), Body()
    a.hold(bodies[0], 60)
    b.hold(bodies[1], 30)
    assert (a.total, b.total) == (90, 90)
    for backlog in (a, b):
        with pytest.raises(GatewayError):
            backlog.check(11)
    a.release(bodies[0])
    b.check(70)


def test_names_have_rows_of_their_own_while_there_are_any() -> None:
    board = Board(2, rows=8)
    rows = {board.find_row(str(i)) for i in range(8)}
    assert len(rows) == 8
    assert {board.find_row(str(i)) for i in range(8)} == rows
    with pytest.raises(BoardFullError):
        board.find_row("one more")
    board.close()


def test_a_pool_that_nobody_has_is_forgotten(two: Two) -> None:
    two.make_pools(make_model(e=1))
    gc.collect()
    assert [len(counts._pools) for counts in two.counts] == [0, 0]
