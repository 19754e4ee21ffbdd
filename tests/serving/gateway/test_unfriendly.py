"""Clients that mean no good: what they send costs them an answer, and leaves nothing behind, nor a line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import threading
import time
from typing import Any

import pytest
from gateway_fakes import Exchange, Gateway, Upstream, gateway, read_reply, wait_until
from raw_requests import PATH, ask, post
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from laguna_serve.serving.gateway.access.asked import MAX_FIELDS, UnreadableError, read_asked
from laguna_serve.serving.gateway.clients.protocol import MOST_AT_ONCE
from laguna_serve.serving.gateway.wire.headers import read_length

KEY = {"name": "k", "sha256": hashlib.sha256(b"sk").hexdigest(), "max_in_flight": 100_000}
AUTH = "authorization: Bearer sk\r\n"
CLOSE = "connection: close\r\n"


def tell(front: Gateway, data: bytes) -> bytes:
    """All that comes back until the connection ends."""
    with front.connect() as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def expect_clean(front: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    front.wait_idle()
    assert [holder.in_flight for holder in front.relay.keys.holders] in ([], [0])
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    ("given", "length"),
    [
        (b"12", 12),
        (b"0" * 5000 + b"12", 12),
        (b"0" * 5000, 0),
        (b"12 \t", 12),
        (b"x", None),
        (b"-1", None),
        (b"", None),
    ],
)
def test_length_is_read_whatever_stands_before_it(given: bytes, length: int | None) -> None:
    assert read_length({b"content-length": given}) == length
    assert read_length({}) == 0


@pytest.mark.parametrize("path", [PATH, "/nope"])
def test_length_with_thousands_of_zeros_is_a_length(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Python reads no number of more than 4,300 digits."""
    with Upstream() as engine, gateway(engine, keys=[KEY]) as front:
        request = ask("POST", path, f"content-length: {'0' * 5000}2\r\n{AUTH}{CLOSE}", b"{}")
        assert tell(front, request).startswith(b"HTTP/1.1 200 " if path == PATH else b"HTTP/1.1 404 ")
        too_much = ask("POST", path, f"content-length: {'0' * 5000}99999999999\r\n{AUTH}{CLOSE}")
        with front.connect() as client:
            client.sendall(too_much)
            assert read_reply(client).status == (413 if path == PATH else 404)
        expect_clean(front, caplog)


def test_thousands_of_requests_behind_a_slow_one_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    """Each was begun within the end of the one before it, until Python's stack was full."""
    go_on = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.answer(b"{}")

    count = 5 * MOST_AT_ONCE + 3000
    with Upstream(handlers={"/v1/slow": wait}) as engine, gateway(engine, keys=[KEY]) as front:
        refused, last = ask("GET", "/nope", AUTH), ask("GET", "/nope", AUTH + CLOSE)
        with front.connect() as client:
            client.sendall(ask("GET", "/v1/slow", AUTH) + refused * count + last)
            engine._loop.call_soon_threadsafe(go_on.set)
            answered = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answered.startswith(b"HTTP/1.1 200 ")
        assert answered.count(b"HTTP/1.1 404 ") == count + 1
        expect_clean(front, caplog)


@pytest.mark.slow
def test_client_that_reads_no_answers_gets_no_more_and_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """Of a million requests those are answered that fit the buffers between; others have their turn meanwhile."""
    count = 1_000_000
    with Upstream() as engine, gateway(engine, keys=[KEY], server={"keepalive_s": 0.5}) as front:
        state = front.server.server_state
        with front.connect() as client:
            client.settimeout(0.2)
            with pytest.raises((TimeoutError, ConnectionResetError)):
                client.sendall(ask("GET", "/v1/x") * count)
            assert front.ask("/health").status == 200
            for protocol in list(state.connections):
                assert len(protocol.pipeline) < count // 10
                assert protocol.transport.get_write_buffer_size() < 2 * HIGH_WATER_LIMIT
            assert state.total_requests < count // 2
            wait_until(lambda: not state.connections)
        expect_clean(front, caplog)


@pytest.mark.slow
def test_client_that_reads_later_gets_all_answers(caplog: pytest.LogCaptureFixture) -> None:
    count = 20_000
    with Upstream() as engine, gateway(engine, keys=[{**KEY, "max_in_flight": 1}]) as front, front.connect() as client:
        sending = threading.Thread(
            target=client.sendall, args=(ask("GET", "/v1/x") * count + ask("GET", "/v1/x", CLOSE),)
        )
        sending.start()
        state = front.server.server_state  # where the system's buffers are that large, all is answered at once
        wait_until(lambda: any(p.flow.write_paused for p in state.connections) or state.total_requests > count)
        answered = b"".join(iter(lambda: client.recv(1 << 16), b""))
        sending.join()
        assert answered.count(b"HTTP/1.1 401 ") == count + 1
        expect_clean(front, caplog)


@pytest.mark.parametrize("before", [0, MOST_AT_ONCE - 1, MOST_AT_ONCE, MOST_AT_ONCE + 1])
def test_body_of_a_request_that_had_to_wait_is_read_to_its_end(before: int) -> None:
    last = post(CLOSE, b'{"model": "m", "prompt": "' + b"x" * 150_000 + b'"}')
    with Upstream() as engine, gateway(engine, server={"body_timeout_s": 3.0}) as front, front.connect() as client:
        client.sendall(ask("GET", "/nope") * before + last[:120_000])
        wait_until(lambda: front.server.server_state.total_requests == before)
        client.sendall(last[120_000:])
        answered = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answered.count(b"HTTP/1.1 404 ") == before
    assert answered.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.slow
def test_client_that_rests_gets_the_rest_of_its_answer() -> None:
    size = 4_000_000

    async def say_much(exchange: Exchange) -> None:
        await exchange.answer(b"x" * size)

    with (
        Upstream(handlers={PATH: say_much}) as engine,
        gateway(engine, server={"keepalive_s": 0.2}) as front,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(("127.0.0.1", front.port))
        client.sendall(post())
        wait_until(lambda: bool(engine.seen))
        time.sleep(0.6)  # longer than a connection is kept that nothing is asked on
        answered = b"".join(iter(lambda: client.recv(1 << 20), b""))
    assert answered.count(b"x" * size) == 1


@pytest.mark.slow
def test_client_that_takes_nothing_more_of_its_answer_is_let_go() -> None:
    async def say_much(exchange: Exchange) -> None:
        await exchange.answer(b"x" * 3_700_000)

    with (
        Upstream(handlers={PATH: say_much}) as engine,
        gateway(engine, server={"keepalive_s": 0.3}, limits={"read_timeout_s": 0.5}) as front,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(("127.0.0.1", front.port))
        client.sendall(post())
        wait_until(lambda: bool(engine.seen))
        wait_until(lambda: not front.server.server_state.connections, 20)


def test_request_behind_another_one_has_its_place() -> None:
    """Of a key that may have one in flight: the one before has ended."""
    with Upstream() as engine, gateway(engine, keys=[{**KEY, "max_in_flight": 1}]) as front:
        answered = tell(front, post(AUTH) * 5 + post(AUTH + CLOSE))
        assert answered.count(b"HTTP/1.1 200 ") == 6


@pytest.mark.parametrize(("method", "headers"), [("POST", AUTH), ("OPTIONS", "")])
def test_body_that_breaks_off_holds_no_bytes(method: str, headers: str) -> None:
    broken = ask(method, PATH, f"{headers}transfer-encoding: chunked\r\n", b"c350\r\n" + b"a" * 50_000 + b"\r\nZZ\r\n")
    with Upstream() as engine, gateway(engine, keys=[KEY], limits={"max_queued_bytes": 100_000}) as front:
        for _ in range(3):
            assert tell(front, broken).startswith(b"HTTP/1.1 400 ")
        wait_until(lambda: front.relay.backlog.total == 0)
        assert front.ask(PATH, b"{}", headers=AUTH).status == 200


def test_those_that_wait_keep_their_order_and_go_with_their_client(caplog: pytest.LogCaptureFixture) -> None:
    with Upstream() as engine, gateway(engine, keys=[KEY]) as front:
        mixed = ask("GET", "/nope", AUTH) + ask("GET", "/health") + post(AUTH, b'{"n": 1}')
        answered = tell(front, post(AUTH, b'{"n": 0}') + mixed * 50 + ask("GET", "/v1/x", AUTH + CLOSE))
        statuses = [part[:3] for part in answered.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", *[b"404", b"200", b"200"] * 50, b"200"]
        for _ in range(3):
            with front.connect() as client:
                client.sendall(post(AUTH) + mixed * 300)
        expect_clean(front, caplog)


@pytest.mark.parametrize("asgi", [False, True])
def test_defect_within_a_request_is_500_and_nothing_of_it_stays(
    asgi: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Upstream() as engine, gateway(engine, keys=[KEY], asgi=asgi) as front:

        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("laguna_serve.serving.gateway.relay.relay.check_codings", fail)
        assert front.ask(PATH, b"{}", headers=AUTH).status == 500
        front.wait_idle()
        assert [holder.in_flight for holder in front.relay.keys.holders] == [0]
        assert "ZeroDivisionError" in caplog.text
        assert "Exception in callback" not in caplog.text


def test_form_of_thousands_of_fields_is_400(caplog: pytest.LogCaptureFixture) -> None:
    form = b"application/x-www-form-urlencoded"
    assert read_asked(b"model=n&" + b"&".join([b"a=1"] * (MAX_FIELDS - 1)), form).model == "n"
    with pytest.raises(UnreadableError):
        read_asked(b"model=n&" + b"&".join([b"a=1"] * MAX_FIELDS), form)
    with Upstream() as engine, gateway(engine, others=["n"]) as front:
        headers = f"content-type: {form.decode()}\r\n{CLOSE}"
        answered = tell(front, post(headers, b"&".join([b"a=1"] * 2000)))
        assert answered.startswith(b"HTTP/1.1 400 ")
        expect_clean(front, caplog)


def test_multipart_form_of_thousands_of_parts_is_400() -> None:
    kind = b"multipart/form-data; boundary=b"
    part = b"--b\r\na: b\r\n\r\n\r\n"
    model = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nn\r\n'
    assert read_asked(part * (MAX_FIELDS - 1) + model + b"--b--", kind).model == "n"
    with pytest.raises(UnreadableError):
        read_asked(part * MAX_FIELDS + model + b"--b--", kind)


def test_client_of_http_1_0_gets_no_interim_answer() -> None:
    with Upstream() as engine, gateway(engine) as front:
        head, body = post("expect: 100-continue\r\n", version="1.0").split(b"\r\n\r\n")
        with front.connect() as client:
            client.sendall(head + b"\r\n\r\n")
            front.server.call(lambda _: None)  # it has read the head by now, or will have it with the body
            client.sendall(body)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [("x-api-key: \r\n" + AUTH, 200), ("x-api-key: \r\n", 401), ("x-api-key: no\r\n" + AUTH, 401), (AUTH, 200)],
)
def test_empty_key_beside_another_is_none(headers: str, status: int) -> None:
    with Upstream() as engine, gateway(engine, keys=[KEY]) as front:
        assert front.ask(PATH, b"{}", headers=headers).status == status


def test_page_of_another_origin_is_told_in_json() -> None:
    with Upstream() as engine, gateway(engine, server={"allowed_origins": ["http://a"]}) as front:
        headers = f"origin: http://b\r\naccess-control-request-method: POST\r\n{CLOSE}"
        for path in (PATH, "/health"):
            reply = front.ask(path, headers=headers, method="OPTIONS")
            assert (reply.status, reply.header("content-type")) == (403, "application/json")
            assert reply.json()["error"]["message"] == "This origin is not one of server.allowed_origins."
