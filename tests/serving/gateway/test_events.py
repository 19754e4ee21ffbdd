"""Streams that break: clients get whole events only, and an error in their API's own form, whatever the client."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from gateway_fakes import SSE, Exchange, Reply, Upstream, gateway, make_request, read_reply
from hypothesis import given, settings
from hypothesis import strategies as st

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.sse import MAX_HELD_BYTES, EventStream, ResponseStream, find_end

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODY = b'{"model": "m", "stream": true}'
LOST = errors.engine_lost().message
CREATED: dict[str, Any] = {
    "type": "response.created",
    "sequence_number": 0,
    "response": {"id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "output": []},
}
DELTA: dict[str, Any] = {
    "type": "response.output_text.delta",
    "sequence_number": 41,
    "item_id": "msg_1",
    "output_index": 0,
    "content_index": 0,
    "delta": 'a "sequence_number": 99',
    "logprobs": [],
}


def event(data: dict[str, Any], *, named: bool = False) -> bytes:
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def list_ends(data: bytes) -> int:
    """Where the last event ends, line by line, as the specification reads it."""
    last = start = 0
    for found in re.finditer(rb"\r\n|\n|\r", data):
        if found.start() == start:
            last = found.end()
        start = found.end()
    return last


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r"]).map(bytes), max_size=14), st.data())
def test_whole_events_pass_at_once_and_nothing_else(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    stream, passed = EventStream(), b""
    for start, end in itertools.pairwise([0, *cuts, len(whole)]):
        piece = whole[start:end]
        passed += piece if stream.passes and piece.endswith(b"\n\n") else stream.take(piece)
        assert passed == whole[: list_ends(whole[:end])]
    assert passed + stream.end() == whole


def test_end_is_found_behind_any_blank_line() -> None:
    for blank in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\n\r"):
        assert find_end(b"data: 1" + blank + b"data: 2") == 7 + len(blank)
    assert find_end(b"data: 1\r\ndata: 2\n") == 0


def test_event_that_is_too_long_to_hold_passes_in_pieces() -> None:
    stream, piece, passed = EventStream(), b"x" * 100_000, bytearray()
    for _ in range(30):
        passed += stream.take(piece)
        assert len(stream._held) <= MAX_HELD_BYTES
    assert stream.broken_open
    passed += stream.take(b"\r\n\r")
    passed += stream.take(b"\ndata: half")
    assert not stream.broken_open
    assert bytes(passed) == piece * 30 + b"\r\n\r\n"
    assert stream.end() == b"data: half"


@pytest.mark.parametrize("kind", [EventStream, ResponseStream])
def test_bytes_one_by_one_cost_no_more_than_their_number(kind: type[EventStream]) -> None:
    """Each is searched once: a hundred thousand of them are quick, where a search from the start would take minutes."""
    stream = kind()
    for _ in range(100_000):
        assert stream.take(b"x") == b""
    assert stream.take(b"\n\n").endswith(b"x\n\n")


def serving(*pieces: bytes, headers: str = SSE, abort: bool = True) -> Callable[[Exchange], Awaitable[None]]:
    """An engine that breaks off behind these pieces."""

    async def handle(exchange: Exchange) -> None:
        chunked = "chunked" in headers
        await exchange.start(headers)
        for piece in pieces:
            if chunked:
                await exchange.chunk(piece)
            else:
                exchange.writer.write(piece)
                await exchange.writer.drain()
            await asyncio.sleep(0.005)
        if abort:
            exchange.abort()
        elif chunked:
            await exchange.end()
        else:
            exchange.writer.close()

    return handle


def ask(path: str, *pieces: bytes, headers: str = SSE, abort: bool = True, asgi: bool = False) -> Reply:
    with (
        Upstream({path: serving(*pieces, headers=headers, abort=abort)}) as engine,
        gateway(engine, asgi=asgi) as front,
    ):
        return front.ask(path, BODY)


FIRST, HALF = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n', b'data: {"choices": [{"ind'


@pytest.mark.slow
@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"])
def test_half_event_is_dropped_whatever_the_line_ends(blank: bytes, asgi: bool) -> None:
    first = FIRST.strip() + blank
    reply = ask(CHAT, first + HALF[:9], HALF[9:], asgi=asgi)
    assert reply.body == first + errors.engine_lost().event(CHAT)


def test_normal_end_passes_every_byte() -> None:
    assert ask(CHAT, FIRST + b"data: tail", abort=False).body == FIRST + b"data: tail"
    assert ask(CHAT, b": ping\n\n", b"\n", b"\xff\xfe", abort=False).body == b": ping\n\n\n\xff\xfe"


def test_stream_with_a_length_that_is_cut_short_ends_in_an_error() -> None:
    reply = ask(CHAT, FIRST + HALF, headers="content-type: text/event-stream\r\ncontent-length: 9999\r\n")
    assert reply.header("content-length") is None
    assert reply.body == FIRST + errors.engine_lost().event(CHAT)
    length = f"content-type: text/event-stream\r\ncontent-length: {len(FIRST)}\r\n"
    assert ask(CHAT, FIRST, headers=length, abort=False).body == FIRST


def test_huge_event_that_breaks_is_cut() -> None:
    reply = ask(CHAT, FIRST, *[b"x" * 500_000] * 4)
    assert reply.cut
    assert reply.body.startswith(FIRST + b"xxx")


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_compressed_stream_that_breaks_is_cut_not_mixed(asgi: bool) -> None:
    packed = gzip.compress(FIRST * 50)
    headers = SSE + "content-encoding: gzip\r\n"
    broken = ask(CHAT, packed[:-10], headers=headers, asgi=asgi)
    assert broken.cut
    assert broken.body == packed[:-10]
    assert ask(CHAT, packed, headers=headers, abort=False, asgi=asgi).body == packed


@pytest.mark.parametrize("headers", ["transfer-encoding: chunked\r\n", "content-length: 99\r\n"])
def test_answer_that_is_no_stream_is_cut(headers: str) -> None:
    reply = ask(CHAT, b'{"half": ', headers="content-type: application/json\r\n" + headers)
    assert (reply.body, reply.cut) == (b'{"half": ', True)


def test_end_that_a_client_of_http_1_0_cannot_see_is_a_reset() -> None:
    handle = serving(b'{"half": ', headers="content-type: application/json\r\ntransfer-encoding: chunked\r\n")
    with Upstream({CHAT: handle}) as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request(CHAT, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"))
        with pytest.raises(ConnectionResetError):
            list(iter(lambda: connection.recv(65536), b""))


def read_events(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]


def test_response_ends_as_openais_does() -> None:
    body = ask(RESPONSES, event(CREATED, named=True), event(DELTA, named=True) + b"event: response.comp").body
    assert b"event: response.failed\ndata: {" in body
    assert b"[DONE]" not in body
    created, delta, error, failed = read_events(body)
    assert (created, delta) == (CREATED, DELTA)
    assert (error["type"], error["sequence_number"], error["message"]) == ("error", 42, LOST)
    assert (failed["type"], failed["sequence_number"]) == ("response.failed", 43)
    expected = {**CREATED["response"], "status": "failed", "error": {"code": "server_error", "message": LOST}}
    assert failed["response"] == expected


def test_response_that_never_began_fails_in_the_same_form() -> None:
    error, failed = read_events(ask(RESPONSES, b": ping\n\n", b"event: resp").body)
    assert (error["sequence_number"], failed["sequence_number"]) == (0, 1)
    assert failed["response"]["object"] == "response"
    assert failed["response"]["id"].startswith("resp_")
    assert failed["response"]["status"] == "failed"


def test_messages_end_in_anthropics_form() -> None:
    start = b'event: message_start\ndata: {"type": "message_start", "message": {}}\n\n'
    body = ask(MESSAGES, start + b'event: content_block_delta\ndata: {"ty').body
    expected = {"type": "error", "error": {"type": "api_error", "message": LOST}}
    assert body == start + b"event: error\ndata: " + json.dumps(expected).encode() + b"\n\n"


def test_coheres_chat_ends_in_its_form() -> None:
    (end,) = read_events(ask("/cohere/v2/chat", b'data: {"ty').body)
    assert end == {"type": "message-end", "delta": {"error": LOST, "finish_reason": "ERROR"}}


def read_openai(path: str, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream: Any
        if path == CHAT:
            stream = client.chat.completions.create(model="m", messages=[], stream=True)
        elif path == COMPLETIONS:
            stream = client.completions.create(model="m", prompt="x", stream=True)
        else:
            stream = client.responses.create(model="m", input="x", stream=True)
        list(stream)


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_openais_client_raises(path: str) -> None:
    first = event(CREATED, named=True) if path == RESPONSES else FIRST
    with (
        Upstream({path: serving(first, HALF)}) as engine,
        gateway(engine) as front,
        pytest.raises(openai.APIError, match=re.escape(LOST)),
    ):
        read_openai(path, front.url)


def read_anthropic(url: str) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        list(client.messages.create(model="m", max_tokens=1, messages=[], stream=True))


@pytest.mark.slow
def test_anthropics_client_raises() -> None:
    from anthropic import APIError  # seconds of imports, for this test alone

    start = {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    usage = {"input_tokens": 1, "output_tokens": 1}
    first = event({"type": "message_start", "message": {**start, "stop_sequence": None, "usage": usage}}, named=True)
    with (
        Upstream({MESSAGES: serving(first, b'event: ping\ndata: {"ty')}) as engine,
        gateway(engine) as front,
        pytest.raises(APIError, match=re.escape(LOST)),
    ):
        read_anthropic(front.url)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.bad_request("no"), "invalid_request_error"),
        (errors.wrong_key(), "authentication_error"),
        (errors.unknown_model("x"), "not_found_error"),
        (errors.body_too_large(1), "request_too_large"),
        (errors.too_often(1), "rate_limit_error"),
        (errors.not_ready(), "overloaded_error"),
        (errors.engine_lost(), "api_error"),
        (errors.failed(), "api_error"),
    ],
    ids=lambda value: str(getattr(value, "status", value)),
)
def test_anthropics_types_of_errors(error: errors.GatewayError, kind: str) -> None:
    assert json.loads(error.body("/v1/messages"))["error"]["type"] == kind
    assert json.loads(error.body("/v1/messages/count_tokens"))["type"] == "error"
    about = json.loads(error.body(CHAT))["error"]
    assert about.keys() == {"message", "type", "param", "code"}
    assert "expected" not in about["message"]


def test_answers_that_come_in_one_packet_with_their_break_lose_nothing() -> None:
    async def at_once(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\n{SSE}\r\n".encode()
        exchange.writer.write(head + b"%x\r\n%s\r\nzz not a chunk" % (len(FIRST), FIRST))
        await exchange.writer.drain()
        await asyncio.sleep(0.2)

    with Upstream({CHAT: at_once}) as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request(CHAT, BODY))
        assert read_reply(connection).body == FIRST + errors.engine_lost().event(CHAT)
