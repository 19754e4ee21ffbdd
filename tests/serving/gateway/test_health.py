"""When an engine is given up, and when it is not: late health checks, refused connections, silence of the last one."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_engine import RlEngine
from gateway_fakes import Exchange, Gateway, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.health import _check
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.failures import UnreachableError

PATH = "/v1/completions"
BODY = b'{"model": "m"}'
QUICK = {"interval_s": 0.05, "timeout_s": 0.5}


@dataclass
class Clinic(Upstream):
    """An upstream whose health checks, at /alive, are answered as `state` says: a status, or not while it is "late"."""

    state: str = "200 OK"
    checks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handlers["/alive"] = self._answer

    async def _answer(self, exchange: Exchange) -> None:
        self.checks.append(time.monotonic())
        while self.state == "late":
            await asyncio.sleep(0.01)
        await exchange.answer(b"", "", self.state)


@contextmanager
def front_of(*engines: Upstream, failures: int = 3, **tables: object) -> Iterator[Gateway]:
    health = {**QUICK, "failures": failures, "path": "/alive"}
    with gateway(*engines, health=health, **tables) as front:
        wait_until(lambda: all(e.healthy and not e.misses for p in front.relay.pools.values() for e in p.engines))
        yield front


def find_engine(front: Gateway, index: int = 0) -> Engine:
    engine: Engine = front.relay.pools["m"].engines[index]
    return engine


@pytest.mark.slow
def test_last_engine_is_never_given_up_for_silence() -> None:
    with Clinic() as clinic, front_of(clinic) as front:
        clinic.state = "late"
        wait_until(lambda: find_engine(front).healthy is False)
        assert find_engine(front).last_error == "/alive: no answer within 0.5 s"
        assert front.ask(PATH, BODY).status == 200
        assert front.ask("/ready").status == 200
        assert front.ask_admin("/admin/status").json()["models"]["m"]["upstreams"][0]["state"] == "silent"
        clinic.state = "200 OK"
        wait_until(lambda: find_engine(front).healthy is True)


@pytest.mark.slow
def test_silent_engine_is_passed_over_where_there_is_another() -> None:
    with Clinic() as silent, Clinic() as well, front_of(silent, well) as front:
        silent.state = "late"
        wait_until(lambda: find_engine(front).healthy is False)
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(4)} == {"b"}
        well.state = "late"
        wait_until(lambda: find_engine(front, 1).healthy is False)
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(12)} == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["503 Service Unavailable", "404 Not Found", "late"])
def test_one_miss_is_none(state: str) -> None:
    with Clinic() as clinic, front_of(clinic, failures=1000) as front:
        clinic.state = state
        wait_until(lambda: find_engine(front).misses > 3)
        assert (find_engine(front).healthy, front.ask(PATH, BODY).status) == (True, 200)
        clinic.state = "200 OK"
        wait_until(lambda: find_engine(front).misses == 0)


@pytest.mark.slow
def test_engine_that_says_that_it_is_unwell_is_given_up_after_several_misses() -> None:
    with Clinic() as clinic, front_of(clinic) as front:
        clinic.state = "500 Internal Server Error"
        wait_until(lambda: front.ask(PATH, BODY).status == 503)
        assert find_engine(front).misses >= 3
        assert front.ask("/ready").status == 503


@pytest.mark.slow
def test_refused_connection_counts_at_once_and_coming_back_too() -> None:
    clinic = Clinic().__enter__()
    with front_of(clinic, failures=1000) as front:
        engine = find_engine(front)
        host, port = "127.0.0.1", int(clinic.url.rpartition(":")[2])
        clinic.__exit__()
        wait_until(lambda: engine.healthy is False)
        assert (engine.misses, engine.last_error) == (1, "/alive: connection refused")
        assert front.ask(PATH, BODY).status == 503
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()
            listener.settimeout(5)
            while engine.healthy is False:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    wait_until(lambda: engine.healthy is True)


@pytest.mark.slow
def test_slow_health_under_load_is_no_outage() -> None:
    """While answers come from an engine, a late health check is no miss."""
    more = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start("content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n")
        while not more.is_set():
            await exchange.chunk(b"data: {}\n\n")
            await asyncio.sleep(0.01)
        await exchange.end()

    with Clinic({PATH: stream}) as clinic, front_of(clinic, failures=1) as front, front.connect() as connection:
        connection.sendall(make_request(PATH, BODY))
        wait_until(lambda: len(front.relay.exchanges) == 1 and next(iter(front.relay.exchanges)).chunks > 0)
        clinic.state, before = "late", len(clinic.checks)
        wait_until(lambda: len(clinic.checks) > before + 2)
        assert (find_engine(front).healthy, find_engine(front).misses) == (True, 0)
        clinic._loop.call_soon_threadsafe(more.set)
        assert read_reply(connection).status == 200
        wait_until(lambda: find_engine(front).healthy is False)


@pytest.mark.slow
def test_slow_engine_holds_up_no_other_check() -> None:
    with Clinic() as slow, Clinic() as quick:
        health = {"interval_s": 0.05, "timeout_s": 60.0, "path": "/alive"}
        with gateway(slow, quick, health=health) as front:
            slow.state, before = "late", len(quick.checks)
            wait_until(lambda: len(quick.checks) > before + 5)
            assert len(slow.checks) - before < 60
            slow.state = "200 OK"
            assert front.ask(PATH, BODY).status == 200


def make_pool(names: str) -> Pool:
    upstreams = [{"name": name, "url": f"http://{name}:1"} for name in names]
    config = parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")
    pool = Pool(config.models[0], config.limits, clock=lambda: 0.0)
    pool.configure(config.models[0], config.limits)
    return pool


def test_breaker_of_the_last_engine_opens_for_refusals_and_not_for_silence() -> None:
    pool = make_pool("a")
    (engine,) = pool.engines
    for _ in range(5):
        engine.note_failure("no connection within 5 s", 0.0, silent=True)
    assert not engine.is_up(0.0)
    assert pool.take(None) is engine
    engine.note_failure("connection refused", 0.0)
    with pytest.raises(GatewayError) as caught:
        pool.take(None)
    assert caught.value.reason == "no_engine"
    engine.note_well()
    assert pool.take(None) is engine


def test_fenced_engine_is_no_last_resort() -> None:
    pool = make_pool("a")
    pool.engines[0].note_miss("late", 1, silent=True)
    assert pool.take(None) is not None
    pool.engines[0].fence("other weights")
    with pytest.raises(GatewayError):
        pool.take(None)


def test_single_bad_answer_of_a_silent_engine_is_not_the_end_of_it() -> None:
    (engine,) = make_pool("a").engines
    engine.note_well()
    for _ in range(3):
        engine.note_miss("late", 3, silent=True)
    engine.note_miss("HTTP 500", 3, silent=False)
    assert engine.is_last_resort()
    for _ in range(2):
        engine.note_miss("HTTP 500", 3, silent=False)
    assert not engine.is_last_resort()


@pytest.mark.parametrize(
    ("error", "text", "silent", "shortage"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"), "connection refused", False, False),
        (OSError("Multiple exceptions: [Errno 111] Connect, [Errno 111] Connect"), "connection refused", False, False),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files", False, True),
        (TimeoutError(), "no connection within 5 s", True, False),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "no connection within 5 s", True, False),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known", False, False),
    ],
)
def test_reasons_of_unreachable_engines(error: OSError, text: str, silent: bool, shortage: bool) -> None:
    found = UnreachableError(error, 5.0)
    assert (str(found), found.silent, found.shortage) == (text, silent, shortage)


def test_connection_refused_by_every_address_of_a_name_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        origin = Origin(f"http://localhost:{taken.getsockname()[1]}")
        with pytest.raises(UnreachableError, match="connection refused"):
            asyncio.run(origin.connect(5.0))


def test_changes_of_an_engine_are_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    (engine,) = make_pool("a").engines
    with caplog.at_level(logging.INFO):
        engine.note_well()
        for _ in range(10):
            engine.note_miss("/health: no answer within 5 s", 3, silent=True)
        for _ in range(3):
            engine.note_well()
        for _ in range(10):
            engine.note_failure("connection refused", 0.0)
        engine.note_success()
        engine.fence("weights")
        engine.fence("weights")
        engine.unfence()
    lines = [(record.levelname, record.getMessage().partition(" after ")[0]) for record in caplog.records]
    assert lines == [
        ("WARNING", "engine a lost: /health: no answer within 5 s"),
        ("INFO", "engine a back"),
        ("WARNING", "engine a lost: 3 connections in a row failed: connection refused"),
        ("INFO", "engine a back"),
        ("WARNING", "engine a fenced off: weights"),
        ("INFO", "engine a no longer fenced off"),
    ]


def test_an_engine_that_may_be_paused_is_given_nothing_until_that_is_known() -> None:
    """It was given requests between its health check and its answer to that, and kept them."""
    with RlEngine() as paused, RlEngine() as other:

        async def answer_late(exchange: Exchange) -> None:
            await asyncio.sleep(0.4)
            await exchange.answer(b'{"is_paused": true}')

        paused.handlers["/is_paused"] = answer_late
        with gateway(paused, other) as front:
            replies = [front.ask(PATH, BODY) for _ in range(4)]
            assert [reply.header("x-upstream") for reply in replies] == ["b"] * 4
            assert front.relay.pools["m"].engines[0].fenced is not None


def test_model_whose_engines_are_silent_is_ready_and_one_whose_refuse_is_not() -> None:
    pool = make_pool("a")
    (engine,) = pool.engines
    assert not pool.is_ready(0.0)
    engine.note_well()
    assert pool.is_ready(0.0)
    engine.note_miss("no answer", 1, silent=True)
    assert (engine.is_up(0.0), pool.is_ready(0.0)) == (False, True)
    engine.note_miss("HTTP 500", 1, silent=False)
    assert not pool.is_ready(0.0)


@pytest.mark.parametrize(
    ("answered", "heard", "paused", "misses"),
    [(0, False, False, 1), (1, False, False, 0), (0, True, False, 0), (0, False, True, 0)],
    ids=["silent", "another request was answered", "a piece of an answer came", "weights are changed"],
)
def test_late_check_is_no_miss_of_an_engine_that_answers_elsewhere(
    answered: int, heard: bool, paused: bool, misses: int
) -> None:
    pool = make_pool("a")
    (engine,) = pool.engines
    engine.note_well()
    pool.paused = paused
    config = parse_config({"models": [{"name": "m", "upstreams": [{"name": "a", "url": "http://a:1"}]}]}, "test")
    relay: Any = SimpleNamespace(config=config, has_heard_from=lambda _engine, _since_s: heard)

    async def answer_late(path: str, timeout_s: float) -> int:
        engine.answers += answered
        raise TimeoutError

    engine.origin = SimpleNamespace(ask_status=answer_late)  # type: ignore[assignment]
    asyncio.run(_check(SimpleNamespace(), relay, pool, engine))  # type: ignore[arg-type]
    assert engine.misses == misses
