"""Connections to engines that are kept: one that the engine has closed costs no request, and none is run twice."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from gateway_fakes import Exchange, Upstream, gateway

from laguna_serve.serving.gateway.engines.origin import KEEPALIVE_S, Origin
from laguna_serve.serving.gateway.wire.failures import BrokenError, SilentError, StaleError
from laguna_serve.serving.gateway.wire.http1 import Connection, Waits

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Told:
    """A receiver that waits for the end."""

    def __init__(self) -> None:
        self.end: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: Any) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_pause(self) -> None: ...

    def on_end(self) -> None:
        self.end.set_result(None)

    def on_error(self, error: OSError) -> None:
        self.end.set_result(error)


def take_request(peer: socket.socket) -> None:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += peer.recv(4096)


async def keep(listener: socket.socket, answer: bytes = ANSWER) -> tuple[Origin, socket.socket]:
    """A connection that has had its first answer, and the engine's end of it."""
    origin = Origin(f"http://127.0.0.1:{listener.getsockname()[1]}")
    connection = await origin.connect(5.0)
    peer, _ = listener.accept()
    told = Told()
    connection.request(REQUEST, told, Waits(), bodiless=False)
    await asyncio.to_thread(take_request, peer)
    peer.sendall(answer)
    assert await asyncio.wait_for(told.end, 5) is None
    return origin, peer


def on_a_kept_connection(steps: Any) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            origin, peer = await keep(listener)
            with peer:
                await steps(origin, peer)
            origin.close()

    asyncio.run(run())


@pytest.mark.parametrize(("status", "is_kept"), [(b"200 OK", True), (b"429 Too Many", True), (b"500 Error", False)])
def test_connection_is_not_kept_behind_an_exception(status: bytes, is_kept: bool) -> None:
    """The server closes it a moment later, perhaps with the next request already received."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            origin, peer = await keep(listener, ANSWER.replace(b"200 OK", status))
            with peer:
                assert (origin.take() is not None) == is_kept
            origin.close()

    asyncio.run(run())


def test_close_that_has_arrived_is_seen_before_the_loop_sees_it() -> None:
    async def steps(origin: Origin, peer: socket.socket) -> None:
        peer.close()
        assert origin.take() is None

    on_a_kept_connection(steps)


def test_close_that_crosses_a_request_leaves_it_unprocessed() -> None:
    async def steps(origin: Origin, peer: socket.socket) -> None:
        connection = origin.take()
        assert connection is not None
        peer.close()
        told = Told()
        connection.request(REQUEST, told, Waits(), bodiless=False)
        assert isinstance(await asyncio.wait_for(told.end, 5), StaleError)

    on_a_kept_connection(steps)


def test_close_behind_a_request_that_was_received_is_none_of_these() -> None:
    async def steps(origin: Origin, peer: socket.socket) -> None:
        connection = origin.take()
        assert connection is not None
        told = Told()
        connection.request(REQUEST, told, Waits(), bodiless=False)
        await asyncio.to_thread(take_request, peer)
        peer.close()
        error = await asyncio.wait_for(told.end, 5)
        assert isinstance(error, BrokenError)
        assert not isinstance(error, StaleError), "it may have been processed"

    on_a_kept_connection(steps)


@pytest.mark.parametrize(("waits", "begun"), [(Waits(None, 0.2), True), (Waits(0.2, 60.0), False)])
def test_silence_counts_from_the_first_byte_of_the_body(waits: Waits, begun: bool) -> None:
    async def steps(origin: Origin, peer: socket.socket) -> None:
        connection = origin.take()
        assert connection is not None
        told = Told()
        connection.request(REQUEST, told, waits, bodiless=False)
        await asyncio.to_thread(take_request, peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if begun:
            await asyncio.sleep(0.5)  # longer than between two bytes
            assert not told.end.done()
            peer.sendall(b"1\r\nx\r\n")
        assert isinstance(await asyncio.wait_for(told.end, 5), SilentError)

    on_a_kept_connection(steps)


@pytest.mark.slow
def test_silence_of_one_answer_is_not_counted_for_the_next() -> None:
    """The timer is kept with the connection: it comes due in the middle of a later answer."""

    async def steps(origin: Origin, peer: socket.socket) -> None:
        waits = Waits(None, 2.0)
        for pause_s in (1.5, 0.7):
            connection = origin.take()
            assert connection is not None
            told = Told()
            connection.request(REQUEST, told, waits, bodiless=False)
            await asyncio.to_thread(take_request, peer)
            if pause_s == 1.5:
                peer.sendall(ANSWER)
            await asyncio.sleep(pause_s)
            if pause_s != 1.5:
                assert not told.end.done()
                peer.sendall(ANSWER)
            assert await asyncio.wait_for(told.end, 5) is None

    on_a_kept_connection(steps)


def test_request_on_a_connection_that_is_lost_meanwhile_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(connection: Connection) -> bool:
        """Between the check and the request."""
        transport = connection._transport
        assert transport is not None
        transport.set_protocol(asyncio.Protocol())
        transport.abort()
        connection.connection_lost(None)
        return True

    monkeypatch.setattr(Connection, "is_usable", lose)
    with Upstream() as engine, gateway(engine) as front:
        for number in range(5):
            assert front.ask("/v1/x", b'{"n": %d}' % number).json()["body"] == f'{{"n": {number}}}'
        assert len(engine.seen) == 5, "none was run twice"
        front.wait_idle()


def test_engine_that_takes_a_request_and_closes_is_502_and_not_asked_again() -> None:
    async def answer(exchange: Exchange) -> None:
        if b'"first"' in exchange.body:
            await exchange.answer(b"{}")
        else:
            exchange.writer.close()

    with Upstream({"/v1/x": answer}) as engine, gateway(engine) as front:
        assert front.ask("/v1/x", b'"first"').status == 200
        assert front.ask("/v1/x", b'"second"').status == 502
        assert len(engine.seen) == 2


def test_long_answers_take_their_time() -> None:
    async def late(exchange: Exchange) -> None:
        await asyncio.sleep(0.6)
        await exchange.answer(b"{}")

    with Upstream({"/v1/x": late}) as engine, gateway(engine, limits={"read_timeout_s": 0.2}) as front:
        started = time.monotonic()
        assert front.ask("/v1/x", b"{}").status == 200
        assert time.monotonic() - started >= 0.6


def test_connection_that_was_idle_too_long_is_not_used_again() -> None:
    """The engine is about to close it: vLLM does after 5 s."""
    assert KEEPALIVE_S < 5

    async def steps(origin: Origin, peer: socket.socket) -> None:
        (connection,) = origin._idle
        connection.idle_since -= KEEPALIVE_S
        assert origin.take() is None
        peer.settimeout(5)
        assert await asyncio.to_thread(peer.recv, 1) == b"", "closed"

    on_a_kept_connection(steps)


def test_connection_that_was_idle_too_long_is_closed_though_nobody_asks_for_one() -> None:
    async def steps(origin: Origin, peer: socket.socket) -> None:
        (connection,) = origin._idle
        now = asyncio.get_running_loop().time()
        for idle_since, kept in ((now + 60, [connection]), (now - KEEPALIVE_S - 1, [])):
            connection.idle_since = idle_since
            origin.expire()
            assert origin._idle == kept
        peer.settimeout(5)
        assert await asyncio.to_thread(peer.recv, 1) == b"", "closed"

    on_a_kept_connection(steps)
