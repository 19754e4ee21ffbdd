"""Faults through the gateway: for each, what the client saw, and that no slot, task or socket was left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest
from gateway_fakes import SSE, Exchange, Gateway, Reply, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.wire import errors

PATH = "/v1/completions"
BODY = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
DONE = b"data: [DONE]\n\n"
MESSAGES = {502: errors.engine_lost().message, 504: errors.engine_silent().message}


@contextlib.contextmanager
def nothing_left(front: Gateway) -> Iterator[None]:
    """Slots, tasks and sockets are after the block what they were before it.

    Connections to engines that may be used again are none of it: a request before the block opens one, and those of
    faults must be closed.
    """
    front.ask(PATH, BODY, "x-warm: 1\r\n")
    before = _count(front)
    yield
    front.wait_idle()
    deadline = time.monotonic() + 5
    while _count(front) > before:
        assert time.monotonic() < deadline, (_count(front), before)
        time.sleep(0.01)


def _count(front: Gateway) -> tuple[int, int]:
    async def count_tasks() -> int:
        return len([task for task in asyncio.all_tasks() if "check" not in repr(task.get_coro())])

    tasks = asyncio.run_coroutine_threadsafe(count_tasks(), front.loop).result(5)
    ports = {front.port, *(int(e.config.url.rpartition(":")[2]) for p in front.relay.pools.values() for e in p.engines)}
    found = psutil.Process(os.getpid()).net_connections("tcp")
    # Either end of a connection of the gateway's; the health checks' own go up and down by one.
    return tasks, sum(c.status == "ESTABLISHED" and c.laddr.port in ports for c in found)


def after_warming(fault: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
    async def handle(exchange: Exchange) -> None:
        if b"x-warm" in exchange.head:
            await exchange.answer(b"{}")
        else:
            await fault(exchange)

    return handle


async def killed(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b'data: {"t": 1}\n\n')
    await asyncio.sleep(0.02)
    exchange.abort()


async def stalled(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b'data: {"t": 1}\n\n')
    await asyncio.sleep(30)


async def truncated(exchange: Exchange) -> None:
    """A chunk that promises more than it has, and a polite end."""
    await exchange.start(SSE)
    exchange.writer.write(b"ff\r\ndata: half")
    await exchange.writer.drain()
    exchange.writer.close()


async def cut_in_a_character(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b'data: {"t": "caf\xc3')
    await asyncio.sleep(0.02)
    exchange.abort()


async def garbage_in_the_body(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b"data: 1\n\n")
    exchange.writer.write(b"\x00\xffno chunk at all\r\n\r\n")
    await asyncio.sleep(0.2)


async def garbage_for_a_head(exchange: Exchange) -> None:
    exchange.writer.write(b"\x16\x03\x01\x00 not http\r\n\r\n")
    await asyncio.sleep(0.2)


async def head_without_end(exchange: Exchange) -> None:
    exchange.writer.write(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(4096):
            exchange.writer.write(b"x-more: " + b"a" * 1000 + b"\r\n")
            await exchange.writer.drain()


async def reset_at_once(exchange: Exchange) -> None:
    exchange.abort()


async def silent(exchange: Exchange) -> None:
    await asyncio.sleep(30)


FAULTS = [
    (killed, 200, 502),
    (stalled, 200, 504),
    (truncated, 200, 502),
    (cut_in_a_character, 200, 502),
    (garbage_in_the_body, 200, 502),
    (garbage_for_a_head, 502, 502),
    (head_without_end, 502, 502),
    (reset_at_once, 502, 502),
    (silent, 504, 504),
]


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
@pytest.mark.parametrize(("fault", "status", "code"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_engine_at_fault(fault: Callable[[Exchange], Awaitable[None]], status: int, code: int, asgi: bool) -> None:
    with (
        Upstream({PATH: after_warming(fault)}) as engine,
        gateway(engine, limits={"read_timeout_s": 0.3, "first_byte_timeout_s": 0.3}, asgi=asgi) as front,
        nothing_left(front),
    ):
        reply = front.ask(PATH, BODY)
        assert (reply.status, reply.cut) == (status, False)
        if status != 200:
            assert reply.json()["error"]["message"] == MESSAGES[code]
            return
        assert reply.body.endswith(b"\n\n" + DONE)
        *whole, error = reply.body.removesuffix(b"\n\n" + DONE).split(b"\n\n")
        assert all(event in (b'data: {"t": 1}', b"data: 1") for event in whole), "no half event"
        assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == MESSAGES[code]
        assert len(engine.seen) == 2, "it was sent once"


FLOOD = 4000
sent: list[int] = [0]


async def flood(exchange: Exchange) -> None:
    await exchange.start(SSE)
    with contextlib.suppress(ConnectionError):
        for index in range(FLOOD):
            sent[0] = index
            await exchange.chunk(b"data: " + b"x" * 10_000 + b"\n\n")
        await exchange.end()


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_reader_that_is_slow_gets_everything_and_holds_up_the_engine(asgi: bool) -> None:
    """40 MB are not kept in the gateway for a client that takes its time: the engine has to wait."""

    def waits() -> bool:
        before = sent[0]
        time.sleep(0.2)
        return 0 < before == sent[0]

    with (
        Upstream({PATH: after_warming(flood)}) as engine,
        gateway(engine, asgi=asgi) as front,
        nothing_left(front),
        front.connect() as connection,
    ):
        connection.sendall(make_request(PATH, BODY))
        wait_until(waits)
        assert sent[0] < FLOOD - 500
        assert len(read_reply(connection).body) == FLOOD * 10_008


def test_reader_that_takes_nothing_is_cut_off() -> None:
    with (
        Upstream({PATH: after_warming(flood)}) as engine,
        gateway(engine, limits={"read_timeout_s": 0.3}) as front,
        nothing_left(front),
        front.connect() as connection,
    ):
        connection.sendall(make_request(PATH, BODY))
        wait_until(lambda: len(front.relay.exchanges) == 1)
        wait_until(lambda: not front.relay.exchanges)
        assert "took nothing" in front.relay.last_errors[0]["error"]


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_client_that_leaves_in_a_stream(asgi: bool) -> None:
    with Upstream({PATH: after_warming(stalled)}) as engine, gateway(engine, asgi=asgi) as front, nothing_left(front):
        with front.connect() as connection:
            connection.sendall(make_request(PATH, BODY))
            assert connection.recv(1)
        wait_until(lambda: bool(engine.gone))


def test_client_that_has_sent_its_next_request_and_leaves() -> None:
    with Upstream({PATH: after_warming(stalled)}) as engine, gateway(engine) as front, nothing_left(front):
        with front.connect() as connection:
            connection.sendall(make_request(PATH, BODY))
            assert connection.recv(1)
            connection.sendall(make_request(PATH, BODY))
            time.sleep(0.1)
        wait_until(lambda: bool(engine.gone))
        assert len(engine.seen) == 2, "the warming and the first: the next never began"


def test_engine_that_fails_connections_is_tried_elsewhere_within_a_budget() -> None:
    dead = Upstream(url="http://127.0.0.1:9")
    with Upstream() as engine, gateway(dead, engine) as front:
        pool = front.relay.pools["m"]
        pool.engines[1].turns = 1e6  # the dead one is chosen first, always
        replies: list[Reply] = []
        for _ in range(30):
            pool.engines[0].healthy, pool.engines[0].open_until = True, 0.0
            replies.append(front.ask(PATH, BODY))
        passed = [reply.status for reply in replies].count(200)
        assert {reply.status for reply in replies} == {200, 502}
        assert 10 <= passed <= 10 + 0.2 * 30 + 1
        front.wait_idle()


@pytest.mark.slow
def test_burst_of_connections() -> None:
    """As many as this machine lets one process have, up to 10,000: both ends are here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, (hard - 500) // 2)
    try:
        with Upstream() as engine, gateway(engine, server={"header_timeout_s": 120.0}) as front:
            connections: list[socket.socket] = []
            try:
                connections.extend(front.connect() for _ in range(count))
                assert front.ask("/v1/models").status == 200
                some = connections[:: max(1, count // 100)]
                for connection in some:
                    connection.sendall(make_request("/v1/models"))
                assert all(read_reply(connection).status == 200 for connection in some)
            finally:
                for connection in connections:
                    connection.close()
            front.wait_idle()
            wait_until(lambda: len(front.server.server_state.connections) == 0, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
