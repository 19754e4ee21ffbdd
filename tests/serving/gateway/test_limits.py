"""What the gateway has only so much of: file descriptors, and memory for bodies that wait."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from gateway_fakes import SSE, Exchange, Gateway, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.config import Config, parse_config
from laguna_serve.serving.gateway.counts.backlog import Backlog
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.relay import open_files
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.failures import UnreachableError

PATH = "/v1/completions"
BODY = b'{"model": "m"}'


def make_config(max_in_flight: int) -> Config:
    upstreams = [{"name": "a", "url": "http://h:1", "max_in_flight": max_in_flight}]
    return parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")


@contextmanager
def process(path: Path, files: tuple[int, int]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A gateway with these limits of open files; its port."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--config", str(path), "--port", "0"]
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, files)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    ) as server:
        try:
            assert server.stdout is not None
            yield server, int(server.stdout.readline().split()[2].rpartition(":")[2])
        finally:
            server.send_signal(signal.SIGKILL)


def write(path: Path, url: str, max_in_flight: int) -> Path:
    text = f'[[models]]\nname = "m"\n[[models.upstreams]]\nname = "a"\nurl = "{url}"\nmax_in_flight = {max_in_flight}\n'
    path.write_text(text)
    return path


@pytest.mark.slow
def test_process_raises_its_limit_of_open_files(tmp_path: Path) -> None:
    with Upstream() as engine, process(write(tmp_path / "g.toml", engine.url, 8), (256, 4096)) as (server, port):
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (4096, 4096)
        assert ask(port) == 200


@pytest.mark.slow
def test_process_without_enough_files_warns_and_survives_a_flood(tmp_path: Path) -> None:
    """More clients than descriptors: some are turned away, a line says so, and later ones are served."""
    with Upstream() as engine, process(write(tmp_path / "g.toml", engine.url, 512), (256, 256)) as (server, port):
        assert server.stderr is not None
        line = server.stderr.readline()
        assert " WARNING gateway: open files: expected a limit of at least 1088 for max_in_flight 512" in line
        connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(400)]
        assert "client turned away" in server.stderr.readline()
        for connection in connections:
            connection.close()
        assert ask(port) == 200


def ask(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(make_request("/v1/models"))
        return read_reply(connection).status


@pytest.mark.parametrize(("limit", "warned"), [(2 * 64 + 64, False), (2 * 64 + 63, True)])
def test_low_limit_is_one_line(caplog: pytest.LogCaptureFixture, limit: int, warned: bool) -> None:
    open_files.warn_if_low(make_config(64), limit)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned


@pytest.mark.parametrize(
    ("limit", "slots", "connections"), [(1024, 64, 896), (1024, 512, 480), (256, 512, 96), (64, 8, 1)]
)
def test_clients_leave_room_for_engines(limit: int, slots: int, connections: int) -> None:
    assert open_files.find_max_connections(make_config(slots), limit) == connections


def test_client_too_many_is_turned_away_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    with Upstream() as engine, gateway(engine) as front:
        front.relay.max_connections = 1
        with front.connect() as first:
            first.sendall(make_request("/v1/models"))
            assert read_reply(first).status == 200
            for _ in range(20):
                with front.connect() as second:
                    reply = read_reply(second)
                    assert (reply.status, reply.header("retry-after")) == (503, "1")
        lines = [record.getMessage() for record in caplog.records if "turned away" in record.getMessage()]
        assert len(lines) == 5, "the rest is counted"
        wait_until(lambda: len(front.server.server_state.connections) == 0)
        text = front.ask("/metrics").body.decode()
        assert 'laguna_gateway_refusals_total{key="",reason="too_many_connections"} 20.0' in text


def test_engine_is_not_blamed_for_the_gateways_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Origin, timeout_s: float) -> None:
        raise UnreachableError(OSError(errno.EMFILE, "Too many open files"), timeout_s)

    with Upstream() as one, Upstream() as two, gateway(one, two) as front:
        monkeypatch.setattr(Origin, "connect", refuse)  # for health checks, too
        for _ in range(8):
            reply = front.ask(PATH, BODY)
            assert (reply.status, reply.header("retry-after")) == (503, "1")
            assert "file descriptors" in reply.json()["error"]["message"]
        for engine in front.relay.pools["m"].engines:
            assert (engine.up, engine.failures, engine.last_error) == (True, 0, None)
        front.wait_idle()


def test_accepting_without_descriptors_is_no_flood_of_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    """As asyncio's own loop reports it, 2,048 times a second."""
    context = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many")}
    with Upstream() as engine, gateway(engine) as front:
        for _ in range(1000):
            front.loop.call_soon_threadsafe(front.loop.call_exception_handler, context)
        assert front.ask(PATH, BODY).status == 200
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["connection could not be opened: Too many"] * 5 + [
        "connections that could not be opened: 995 more in 10 s"
    ]


class Body:
    held = 0


def test_backlog_counts_every_body_once() -> None:
    backlog, one, two = Backlog(100), Body(), Body()
    backlog.hold(one, 40)
    backlog.hold(one, 60)
    backlog.hold(two, 40)
    assert backlog.total == 100
    with pytest.raises(GatewayError, match="bytes"):
        backlog.hold(two, 41)
    backlog.release(two)
    backlog.release(two)
    assert backlog.total == 60
    backlog.check(40)
    with pytest.raises(GatewayError) as caught:
        backlog.check(41)
    assert (caught.value.status, caught.value.reason) == (429, "queue_bytes_full")


@contextmanager
def held_engine(asgi: bool) -> Iterator[tuple[Gateway, Callable[[], object]]]:
    """An engine with one slot, which is taken until it is released; bodies of 100 kB in all may wait."""
    release = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await exchange.start(SSE)
        await release.wait()
        await exchange.end()

    limits = {"max_queued_bytes": 100_000}
    with (
        Upstream({PATH: hold}) as engine,
        gateway(engine, limits=limits, upstream={"max_in_flight": 1}, asgi=asgi) as front,
    ):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(front.ask, PATH, BODY)
            wait_until(lambda: len(engine.seen) == 1)
            yield front, partial(engine._loop.call_soon_threadsafe, release.set)
            engine._loop.call_soon_threadsafe(release.set)
            assert first.result(5).status == 200
        front.wait_idle()
        assert front.relay.backlog.total == 0


def make_body(size: int) -> bytes:
    body = json.dumps({"model": "m", "prompt": ""}).encode()
    return body[:-2] + b"x" * (size - len(body)) + body[-2:]


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_bodies_in_the_queue_are_bounded_by_their_bytes(asgi: bool) -> None:
    with held_engine(asgi) as (front, release), ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(front.ask, PATH, make_body(60_000))
        wait_until(lambda: front.relay.pools["m"].queued == 1)
        assert front.relay.backlog.total == 60_000
        reply = front.ask(PATH, make_body(60_000))
        assert (reply.status, reply.header("retry-after")) == (429, "1")
        small = pool.submit(front.ask, PATH, make_body(30_000))
        wait_until(lambda: front.relay.pools["m"].queued == 2)
        text = front.ask("/metrics").body.decode()
        assert "laguna_gateway_queued_bytes 90000.0" in text
        assert 'laguna_gateway_refusals_total{key="",reason="queue_bytes_full"} 1.0' in text
        release()
        assert [waiting.result(5).status, small.result(5).status] == [200, 200]


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_bodies_that_still_arrive_count_too(asgi: bool) -> None:
    chunked = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with held_engine(asgi) as (front, _), front.connect() as slow, front.connect() as other:
        for connection in (slow, other):
            connection.sendall(chunked + b"c350\r\n" + b"x" * 40_000)
        wait_until(lambda: front.relay.backlog.total == 80_000)
        assert front.ask(PATH, make_body(30_000)).status == 429
        slow.sendall(b"x" * 10_000 + b"\r\nc350\r\n" + b"x" * 30_000)
        assert read_reply(slow).status == 429
        wait_until(lambda: front.relay.backlog.total == 40_000)
        other.close()
        wait_until(lambda: front.relay.backlog.total == 0)
