"""Requests that offer an upgrade, trail headers or pad their chunks, cut anywhere: read as plain ones, in memory."""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import Any

import pytest
import uvicorn
from gateway_fakes import Upstream, gateway
from raw_requests import CHUNKED, OFFER, PATH, UPGRADES, WHOLE, ask, chunked, post
from uvicorn.server import ServerState

from laguna_serve.serving.gateway.clients.startup_check import Wire
from laguna_serve.serving.gateway.clients.strict_http import StrictProtocol

INNER = post(body=b'{"evil": 1}')


def read(*pieces: bytes) -> tuple[list[tuple[str, bytes, dict[bytes, bytes]]], bytes]:
    """The requests that an application gets of what a client sends: target, body and headers; and what is answered."""
    found: list[tuple[str, bytes, dict[bytes, bytes]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        found.append((scope["path"], body, dict(scope["headers"])))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> bytes:
        config = uvicorn.Config(app, http=StrictProtocol, ws="none", lifespan="off", log_config=None)
        wire = Wire()
        protocol = StrictProtocol(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(wire)  # type: ignore[arg-type]
        for piece in pieces:
            if piece and not wire.closed:
                protocol.data_received(piece)
            for _ in range(5):
                await asyncio.sleep(0)
        protocol.connection_lost(None)
        return wire.written

    answered = asyncio.run(run())
    return found, answered


@pytest.mark.parametrize("name", [name for name in UPGRADES if name != "websocket"])
def test_offer_is_ignored_wherever_it_is_cut(name: str) -> None:
    request = UPGRADES[name]
    whole, answered = read(request)
    assert whole
    assert answered.count(b"HTTP/1.1 200 OK") == len(whole)
    for at in range(1, len(request), 11):
        assert read(request[:at], request[at:])[0] == whole
    assert read(*(request[at : at + 1] for at in range(len(request))))[0] == whole


def test_body_behind_an_offer_is_a_body() -> None:
    ((path, body, headers),), _ = read(post(OFFER, INNER))
    assert (path, body) == (PATH, INNER)
    assert not {b"upgrade", b"http2-settings"} & headers.keys()
    assert headers[b"connection"] == b""
    assert [body for _, body, _ in read(chunked(WHOLE, OFFER) + post(OFFER))[0]] == [
        WHOLE[4:-7],
        b'{"model": "m", "prompt": "x"}',
    ]


def test_offers_without_end_are_read_one_by_one() -> None:
    found, _ = read(*[ask("GET", "/v1/x", OFFER)] * 300)
    assert len(found) == 300


def test_tunnel_is_refused() -> None:
    found, answered = read(ask("CONNECT", "elsewhere:443") + INNER)
    assert found == []
    assert answered.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("name", ["trailers", "trailers-then-get"])
def test_trailers_are_no_headers_of_any_request(name: str) -> None:
    request = CHUNKED[name]
    for at in range(0, len(request), 5):
        for _, _, headers in read(request[:at], request[at:])[0]:
            assert not {b"x-checksum", b"x-evil", b"authorization"} & headers.keys()


@pytest.mark.slow
@pytest.mark.parametrize("start", [b"2;x=", b"2\r\n{}\r\n0\r\nx-long: "], ids=["extension", "trailer"])
def test_padding_without_end_is_refused(start: bytes) -> None:
    with Upstream() as engine, gateway(engine, server={"max_head_bytes": 4096}) as front, front.connect() as client:
        client.sendall(ask("POST", PATH, "transfer-encoding: chunked\r\n") + start)
        answer = b""
        with contextlib.suppress(ConnectionError):  # what was sent behind the refusal resets the connection
            for _ in range(2000):
                client.sendall(b"a" * 2000)
                if select.select([client], [], [], 0)[0]:
                    break
            answer = client.recv(65536)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        assert engine.seen == []
        front.wait_idle()
