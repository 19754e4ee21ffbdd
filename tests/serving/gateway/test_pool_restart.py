"""The gateway's pool when one of its engines is started again: who waits, who is refused, which weights are served."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from laguna_serve.serving.gateway.config.tables import Limits, Model, Upstream
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.reach import reach
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.failures import UnreachableError

NEW = "http://127.0.0.1:2"


def make_pool(*names: str, **limits: Any) -> Pool:
    upstreams = tuple(Upstream(name=name, url="http://127.0.0.1:1") for name in names)
    model, given = Model(name="m", upstreams=upstreams), Limits(**limits)
    pool = Pool(model, given)
    pool.configure(model, given)
    pool.engines[0].returns = True
    return pool


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_requests_wait_for_an_engine_that_returns() -> None:
    async def test() -> None:
        pool = make_pool("engine")
        old = pool.engines[0]
        old.leave("it has died")
        waiting = [asyncio.create_task(pool.acquire(None)) for _ in range(5)]
        await asyncio.sleep(0)
        assert pool.queued == 5
        old.note_well()  # whatever answers at its address
        pool.wake()
        await asyncio.sleep(0)
        assert pool.queued == 5
        pool.succeed(old, NEW)
        got = await asyncio.gather(*waiting)
        assert {engine.config.url for engine in got} == {NEW}
        assert (pool.engines[0].in_flight, pool.engines[0].restarts, old.in_flight) == (5, 1, 0)

    run(test)


def test_requests_in_flight_end_at_the_old_engine() -> None:
    async def test() -> None:
        pool = make_pool("engine")
        old = await pool.acquire(None)
        old.leave("it has died")
        pool.succeed(old, NEW)
        pool.release(old)
        assert (old.in_flight, pool.engines[0].in_flight) == (0, 0)

    run(test)


def test_another_engine_serves_meanwhile() -> None:
    async def test() -> None:
        pool = make_pool("engine", "other")
        pool.engines[0].leave("it has died")
        assert [(await pool.acquire(None)).name for _ in range(3)] == ["other"] * 3
        pool.succeed(pool.engines[0], NEW)
        assert [engine.name for engine in pool.engines] == ["engine", "other"]
        assert (await pool.acquire(None)).name == "engine"

    run(test)


def test_an_engine_that_is_given_up_is_waited_for_no_longer() -> None:
    async def test() -> None:
        pool = make_pool("engine")
        pool.engines[0].leave("it has died")
        waiting = asyncio.create_task(pool.acquire(None))
        await asyncio.sleep(0)
        pool.give_up(pool.engines[0])
        with pytest.raises(GatewayError) as caught:
            await waiting
        assert caught.value.status == 503

    run(test)


def test_the_wait_has_a_deadline() -> None:
    async def test() -> None:
        pool = make_pool("engine", queue_timeout_s=0.01)
        pool.engines[0].leave("it has died")
        with pytest.raises(GatewayError) as caught:
            await pool.acquire(None)
        assert caught.value.status == 503, "not a full queue's 408: there is no engine"

    run(test)


def test_others_engines_are_not_waited_for() -> None:
    async def test() -> None:
        pool = make_pool("engine")
        pool.engines[0].returns = False
        pool.engines[0].leave("it has died")
        with pytest.raises(GatewayError):
            await pool.acquire(None)

    run(test)


@pytest.mark.parametrize("versions", [("step-2", None), (None, "draft-2"), (None, None)])
def test_after_an_update_a_new_engine_is_fenced_until_the_next(versions: tuple[str | None, str | None]) -> None:
    """Also after one that brought no name: the checkpoint's weights are called "default" too."""

    async def test() -> None:
        pool = make_pool("engine")
        pool.set_versions(*versions)
        old = pool.engines[0]
        old.leave("it has died")
        waiting = asyncio.create_task(pool.acquire(None))
        await asyncio.sleep(0)
        pool.succeed(old, NEW)
        new: Engine = pool.engines[0]
        assert new.fenced is not None
        with pytest.raises(GatewayError) as caught:
            await waiting  # nobody but a trainer can help: not worth the wait
        assert caught.value.status == 503
        new.note_well()
        with pytest.raises(GatewayError):
            await pool.acquire(None)
        pool.set_versions("step-3", None)
        new.note_well()
        assert (await pool.acquire(None)) is new
        assert new.versions[0] == b"step-3"

    run(test)


def test_a_reload_keeps_the_new_address() -> None:
    async def test() -> None:
        pool = make_pool("engine")
        pool.succeed(pool.engines[0], NEW)
        new = pool.engines[0]
        model = Model(name="m", affinity="prefix", upstreams=(Upstream(name="engine", url=NEW),))
        pool.configure(model, pool.limits)
        assert pool.engines == [new]
        assert new.returns

    run(test)


@pytest.mark.parametrize(
    ("error", "is_down", "failures"),
    [(ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True, 0), (TimeoutError(), False, 1)],
    ids=["refused", "silent"],
)
def test_engine_that_returns_is_down_when_it_refuses_and_not_for_silence(
    error: OSError, is_down: bool, failures: int
) -> None:
    """What is silent is not known to have died: only failures in a row count. The request goes on to another one."""

    async def test() -> None:
        pool = make_pool("a", "b")
        first, other = pool.engines
        errors, made = [UnreachableError(error, 5.0)], object()

        async def refuse(timeout_s: float) -> None:
            raise errors.pop()

        async def connect(timeout_s: float) -> object:
            return made

        first.origin = SimpleNamespace(connect=refuse)  # type: ignore[assignment]
        other.origin = SimpleNamespace(connect=connect)  # type: ignore[assignment]
        request: Any = SimpleNamespace(engine=None, affinity=None, priority=0, policy=None)
        assert await reach(request, pool, 0, afresh=True) is made
        assert (request.engine, first.in_flight, other.in_flight) == (other, 0, 1)
        assert (first.healthy is False, first.failures) == (is_down, failures)

    run(test)
