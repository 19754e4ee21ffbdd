"""What the admin port and the public one do not take: bodies without end, codings, bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import time
from typing import Any

import pytest
from gateway_engine import RlEngine
from gateway_fakes import Exchange, Gateway, Reply, Upstream, gateway, read_reply, wait_until
from raw_requests import JSON, OFFER, PATH, WHOLE, ask, chunked, post

from laguna_serve.serving.gateway.relay.journal import logger as journal_logger

SMALL = {"max_body_bytes": 4096, "max_head_bytes": 4096}
CODED = "transfer-encoding: gzip, chunked\r\n"
CHUNK = b"1000\r\n%b\r\n" % (b" " * 4096)
ON_JSON = "content-type: application/json\r\ntransfer-encoding: chunked\r\n"


def send(port: int, *parts: bytes) -> tuple[Reply, bytes]:
    """The first answer to what is sent, and what comes behind it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        file = connection.makefile("rb")
        reply = read_reply(connection, file)
        try:
            return reply, file.read()
        except ConnectionError:
            return reply, b""


def admin(request: bytes) -> bytes:
    return request.replace(b"host: x", b"host: 127.0.0.1")


def read_error(reply: Reply) -> tuple[int, Any, Any]:
    error = reply.json()["error"]
    assert reply.header("content-type") == "application/json"
    assert error.keys() == {"message", "type", "param", "code"}
    return reply.status, error["type"], error["code"]


@pytest.mark.parametrize("where", ["port", "admin_port"])
def test_coding_before_chunked_is_501(where: str, caplog: pytest.LogCaptureFixture) -> None:
    with RlEngine() as engine, gateway(engine) as front, caplog.at_level(logging.WARNING, journal_logger.name):
        for headers in (CODED, "transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n"):
            path = PATH if where == "port" else "/pause"
            reply, more = send(getattr(front, where), admin(ask("POST", path, headers, WHOLE)), admin(post()))
            assert read_error(reply) == (501, "invalid_request_error", "unsupported_encoding")
            assert "'gzip'" in reply.json()["error"]["message"]
            assert (reply.header("connection"), more) == ("close", b"")
        assert engine.seen == []
        assert caplog.messages == []  # it is no failure of the gateway's
        plain, _ = send(front.port, ask("POST", PATH, "transfer-encoding: , Chunked\r\nconnection: close\r\n", WHOLE))
        assert plain.status == 200


@pytest.mark.parametrize("where", ["port", "admin_port"])
@pytest.mark.parametrize("coding", ["gzip", "chunked, gzip", "identity", "chunked, chunked"])
def test_body_whose_end_nobody_knows_is_400(where: str, coding: str) -> None:
    with Upstream() as engine, gateway(engine) as front:
        request = admin(ask("POST", PATH, f"transfer-encoding: {coding}\r\n", WHOLE))
        assert read_error(send(getattr(front, where), request)[0]) == (400, "invalid_request_error", None)
        assert engine.seen == []


@pytest.mark.parametrize("where", ["port", "admin_port"])
@pytest.mark.parametrize(
    "request_",
    [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", ask("FOO", "/v1/x"), chunked(b"zz\r\n")],
    ids=["tls", "cut", "method", "chunk"],
)
def test_what_is_no_http_is_told_in_json(where: str, request_: bytes) -> None:
    with Upstream() as engine, gateway(engine) as front:
        reply, more = send(getattr(front, where), admin(request_))
        assert read_error(reply) == (400, "invalid_request_error", None)
        assert (reply.header("connection"), more) == ("close", b"")


def test_what_is_no_http_is_told_as_its_api_says_it() -> None:
    with Upstream() as engine, gateway(engine) as front:
        reply, _ = send(front.port, ask("POST", "/v1/messages", "transfer-encoding: chunked\r\n", b"zz\r\n"))
        assert reply.json() == {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "Invalid HTTP request received."},
        }


def test_head_that_is_too_large_or_too_slow_is_told_in_json() -> None:
    with Upstream() as engine, gateway(engine, server={**SMALL, "header_timeout_s": 0.2}) as front:
        for port in (front.port, front.admin_port):
            reply, _ = send(port, ask("GET", "/v1/x", f"x-long: {'a' * 8192}")[:-2])
            assert read_error(reply) == (431, "invalid_request_error", "headers_too_large")
        for port in (front.port, front.admin_port):
            for begun in (b"", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: "):
                reply, more = send(port, begun)
                assert read_error(reply) == (408, "timeout_error", "request_timeout")
                assert (reply.header("connection"), more) == ("close", b"")


@pytest.mark.slow
def test_admin_head_behind_an_answer_has_as_long() -> None:
    with (
        RlEngine() as engine,
        gateway(engine, server={"header_timeout_s": 0.5}) as front,
        socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as client,
    ):
        file = client.makefile("rb")
        for _ in range(3):
            client.sendall(admin(ask("GET", "/is_paused"))[:20])
            time.sleep(0.3)
            client.sendall(admin(ask("GET", "/is_paused"))[20:])
            assert read_reply(client, file).status == 200
        client.sendall(b"GET /is_paused HT")
        assert read_error(read_reply(client, file)) == (408, "timeout_error", "request_timeout")
        assert file.read() == b""


def test_admin_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laguna_serve.serving.gateway.clients.admin_http.LINGER_S", 0.1)
    with RlEngine() as engine, gateway(engine, server={"body_timeout_s": 0.2}) as front:
        request = admin(ask("POST", "/sleep", "content-type: application/json\r\ncontent-length: 10\r\n"))
        reply, more = send(front.admin_port, request, b"{")
        assert (reply.status, more) == (408, b"")
        assert engine.seen == []


def test_admin_work_outlives_the_time_limits_of_heads_and_bodies() -> None:
    async def take_long(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await exchange.answer(b"{}")

    limits = {"header_timeout_s": 0.1, "body_timeout_s": 0.1}
    with RlEngine() as engine, gateway(engine, server=limits) as front:
        engine.handlers["/sleep"] = take_long
        reply, _ = send(front.admin_port, admin(post("connection: close\r\n", b"{}", target="/sleep")))
        assert reply.status == 200


def test_client_too_many_is_told_in_json() -> None:
    with Upstream() as engine, gateway(engine) as front:
        front.relay.max_connections = 0
        reply, _ = send(front.port)
        assert read_error(reply) == (503, "server_error", "service_unavailable")
        assert reply.header("retry-after") == "1"


def is_too_large(reply: Reply) -> bool:
    return read_error(reply) == (413, "invalid_request_error", "request_too_large")


def test_admin_body_of_too_much_is_413() -> None:
    with RlEngine() as engine, gateway(engine, server=SMALL) as front:
        port = front.admin_port
        announced = ask("POST", "/update_weights", "content-length: 4097\r\nexpect: 100-continue\r\n")
        reply, more = send(port, admin(announced), b" " * 4097, admin(ask("GET", "/is_paused")))
        assert is_too_large(reply)
        assert more == b""
        for path in ("/admin/update_weights", "/sleep"):
            begun = admin(ask("POST", path, ON_JSON))
            reply, more = send(port, begun, CHUNK, b"1\r\n \r\n", CHUNK, b"0\r\n\r\n", admin(ask("GET", "/is_paused")))
            assert is_too_large(reply)
        assert engine.seen == []
        body = json.dumps({"pad": "x" * 3000}).encode()
        reply, _ = send(port, admin(post("connection: close\r\n", body, target="/sleep")))
        assert reply.status == 200


def test_admin_body_without_end_does_not_hold_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laguna_serve.serving.gateway.clients.admin_http.LINGER_S", 0.1)
    with RlEngine() as engine, gateway(engine, server=SMALL) as front:
        with socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as connection:
            connection.sendall(admin(ask("POST", "/sleep", ON_JSON)) + CHUNK + CHUNK)
            assert is_too_large(read_reply(connection))
            assert connection.recv(1) == b""
        wait_until(lambda: not front.server._admin.server_state.connections)
        assert not front.server._admin.server_state.tasks


@pytest.mark.parametrize("padding", [b"2;x=", b"2\r\n{}\r\n0\r\nx-long: "], ids=["extension", "trailer"])
def test_admin_body_that_is_padded_is_400(padding: bytes) -> None:
    with RlEngine() as engine, gateway(engine, server=SMALL) as front:
        with socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as client:
            client.sendall(admin(ask("POST", "/sleep", ON_JSON)) + padding)
            while not select.select([client], [], [], 0.01)[0]:
                client.sendall(b"a" * 1000)
            reply = read_reply(client)
        assert read_error(reply) == (400, "invalid_request_error", None)
        assert engine.seen == []


def test_offer_to_upgrade_does_not_hide_an_admin_body() -> None:
    with RlEngine() as engine, gateway(engine, server=SMALL) as front:
        request = admin(ask("POST", "/sleep", OFFER + "content-length: 5000\r\n"))
        assert is_too_large(send(front.admin_port, request, b" " * 5000)[0])
        reply, _ = send(front.admin_port, admin(post(OFFER + "connection: close\r\n", b"{}", target="/sleep")))
        assert reply.status == 200
        assert [(exchange.line, exchange.body) for exchange in engine.seen] == [("POST /sleep HTTP/1.1", b"{}")]


def test_refusal_does_not_stand_in_an_earlier_answer() -> None:
    """The first request's answer comes whole, or not at all."""
    with RlEngine() as engine, gateway(engine, server=SMALL) as front:
        large = admin(ask("POST", "/sleep", "content-length: 5000\r\n"))
        for second in (large, b"\x00\x01\r\n\r\n"):
            reply, more = send(front.admin_port, admin(ask("GET", "/admin/status")) + second)
            assert reply.status in (0, 200)
            assert b"HTTP/1.1" not in more


def test_admin_client_that_leaves_in_a_body_is_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with RlEngine() as engine, gateway(engine) as front:
        for path in ("/sleep", "/admin/update_weights"):
            leave(front, path)
        wait_until(lambda: not front.server._admin.server_state.tasks)
        assert [record for record in caplog.records if record.exc_info] == []


def leave(front: Gateway, path: str) -> None:
    with socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as connection:
        connection.sendall(admin(ask("POST", path, "content-length: 100\r\n", JSON)))
        wait_until(lambda: bool(front.server._admin.server_state.tasks))
