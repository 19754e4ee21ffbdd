"""The gateway's own protocol against the same relay as an ASGI application under uvicorn's.

Raw requests get the same statuses and bodies, engines see the same, and connections end the same way.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from gateway_fakes import SSE, Exchange, Gateway, Upstream, echo, gateway, read_headers
from raw_requests import PATH, REQUESTS, SMUGGLING, UPGRADES, ask

from laguna_serve.serving.gateway.clients import refusals
from laguna_serve.serving.gateway.clients.strict_http import INVALID, StrictProtocol

# Behind what a case sends: it is answered exactly if the connection was kept.
LAST = ask("GET", "/v1/last", "connection: close\r\n")
# uvicorn sends chunks to a client of HTTP/1.0 too.
NOT_COMPARED = frozenset(("date", "server", "transfer-encoding"))
MADE_ID = re.compile(rb"\b[0-9a-f]{32}\b|(?<=\"created\":)\d+")
SETTINGS = {"max_body_bytes": 1 << 20, "body_timeout_s": 0.5, "header_timeout_s": 5.0}
# What differs, and why it may.
EXCEPTIONS = {
    "asterisk": "Starlette's router knows no path without a slash, and refuses in its own words",
    "expect-and-refused": "uvicorn answers what follows on the connection before its application has begun to answer",
}
# Stock uvicorn loses the body of a request that offers an upgrade, and makes headers of trailers: here it runs with the
# gateway's repair of both.
REPAIRED = frozenset((*UPGRADES, "trailers", "trailers-then-get"))
# What a gateway asks an engine by itself, whenever it likes.
OWN = tuple(f"GET {path} HTTP/1.1" for path in ("/v1/models", "/is_paused", "/weight_info"))
# Sent byte by byte too.
SPLIT = ("post", "chunk-extensions", "trailers-then-get", "three-posts", "h2c-that-holds-a-request", "h2c-chunked")


class Engine(Upstream):
    """Echoes, one request after the other."""

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(v) for k, v in read_headers(head) if k == "content-length"), 0)
        exchange = Exchange(head, await reader.readexactly(length), writer, reader)
        path = exchange.line.split(" ")[1]
        if path == "/health":
            await exchange.answer(b"")
        elif path == "/weight_info":
            await exchange.answer(b"", status="404 Not Found")
        else:
            self.seen.append(exchange)
            await ANSWERS.get(path, echo)(exchange)


async def stream(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b"data: 1\n\ndata: 2")
    await exchange.chunk(b"\n\n")
    await exchange.end()


async def answer_nothing(exchange: Exchange) -> None:
    await exchange.start("x-a: 1\r\n", "204 No Content")


async def redirect(exchange: Exchange) -> None:
    host = dict(read_headers(exchange.head))["host"]
    await exchange.answer(b"", f"location: http://{host}/v1/there\r\n", "307 Temporary Redirect")


async def name_a_hop(exchange: Exchange) -> None:
    await exchange.answer(b"{}", "connection: x-hop\r\nx-hop: 1\r\nx-end: 1\r\n", "299 Odd")


ANSWERS = {"/v1/stream": stream, "/v1/nothing": answer_nothing, "/v1/redirect": redirect, "/v1/hop": name_a_hop}


@dataclass(frozen=True)
class Outcome:
    """What became of a case. `answers`: status, body, and the headers that are not of one hop."""

    answers: list[tuple[int, bytes, list[tuple[str, str]]]]
    seen: list[tuple[bytes, bytes]]
    kept: bool


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def direct(engine: Engine) -> Iterator[Gateway]:
    with gateway(engine, server=SETTINGS) as front:
        yield front


@pytest.fixture(scope="module")
def asgi(engine: Engine) -> Iterator[Gateway]:
    with gateway(engine, server=SETTINGS, asgi=True) as front:
        yield front


@pytest.fixture(scope="module")
def repaired(engine: Engine) -> Iterator[Gateway]:
    with gateway(engine, server=SETTINGS, asgi=StrictProtocol) as front:
        yield front


def try_out(front: Gateway, engine: Engine, request: bytes, *, split: bool = False) -> Outcome:
    before, sent = len(engine.seen), request + LAST
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        received = b""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(sent), 1 if split else len(sent)):
                connection.sendall(sent[at : at + (1 if split else len(sent))])
            while data := connection.recv(65536):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            pass  # what was not read when the server closed
    asked = [e for e in engine.seen[before:] if e.line not in OWN]
    seen = [(MADE_ID.sub(b"ID", e.head), e.body) for e in asked]
    kept = bool(seen) and seen[-1][0].startswith(b"GET /v1/last ")
    return Outcome(list(read_answers(received)), seen, kept)


def read_answers(data: bytes) -> Iterator[tuple[int, bytes, list[tuple[str, str]]]]:
    """Every answer of a connection; one without a length ends with it."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        headers = dict(read_headers(head + b"\r\n\r\n"))
        status = int(head.split(b" ")[1])
        if headers.get("transfer-encoding") == "chunked":
            body, data = read_chunks(data)
        elif "content-length" in headers and not data.startswith(b"HTTP/1.1 "):  # as after HEAD
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
        elif status == 100 or data.startswith(b"HTTP/1.1 "):
            body = b""
        else:
            body, data = data, b""
        headers["x-request-id"] = MADE_ID.sub(b"ID", headers.get("x-request-id", "").encode()).decode()
        told = sorted(item for item in headers.items() if item[0] not in NOT_COMPARED)
        yield status, MADE_ID.sub(b"ID", body), told


def put_in_form(outcome: Outcome) -> Outcome:
    """What uvicorn says of bytes that are no HTTP is text; the gateway says the same in the API's form."""
    error = refusals.not_http()
    length = ("content-length", str(len(error.body(PATH))))
    headers = sorted([("connection", "close"), ("content-type", "application/json"), length, ("x-request-id", "")])
    ours = (400, error.body(PATH), headers)
    answers = [ours if body == INVALID.encode() else (status, body, h) for status, body, h in outcome.answers]
    return replace(outcome, answers=answers)


def read_chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body, data = body + data[:length], data[length + 2 :]
        if length == 0:
            return body, data


def test_cases_are_many() -> None:
    assert len(REQUESTS) >= 90
    assert EXCEPTIONS.keys() <= REQUESTS.keys()


@pytest.mark.parametrize("name", REQUESTS)
def test_both_paths_agree(name: str, engine: Engine, direct: Gateway, asgi: Gateway, repaired: Gateway) -> None:
    one = try_out(direct, engine, REQUESTS[name])
    two = put_in_form(try_out(repaired if name in REPAIRED else asgi, engine, REQUESTS[name]))
    if name in EXCEPTIONS:
        assert one != two, "an exception that is none any more"
    else:
        assert one == two


@pytest.mark.parametrize("name", SMUGGLING)
def test_what_is_framed_in_two_ways_is_refused_or_clear(name: str, engine: Engine, direct: Gateway) -> None:
    outcome = try_out(direct, engine, REQUESTS[name])
    if outcome.answers[0][0] == 400:
        assert outcome.seen == [], "nothing of it was forwarded"
        assert not outcome.kept
    else:
        assert [line for line, _ in outcome.seen if b"transfer-encoding" in line.lower()] == []


@pytest.mark.parametrize("name", SPLIT)
def test_segments_make_no_difference(name: str, engine: Engine, direct: Gateway) -> None:
    assert try_out(direct, engine, REQUESTS[name], split=True) == try_out(direct, engine, REQUESTS[name])
