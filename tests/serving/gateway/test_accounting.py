"""Tokens under a key, through the gateway: what engines tell and clients do not see, leavers, limits, models, usage."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any

import pytest
from gateway_fakes import SSE, Exchange, Gateway, Upstream, gateway, make_request, read_headers, read_reply, wait_until

from laguna_serve.serving.gateway.access.edits import drop_usage

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
KEY = "authorization: Bearer sk\r\n"
USAGE = {"prompt_tokens": 11, "total_tokens": 16, "completion_tokens": 5}


def make_key(name: str = "agents", secret: str = "sk", **limits: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **limits}


def render(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


async def answer(exchange: Exchange) -> None:
    """As vLLM: a stream has its usage in an event of its own, if that is asked for."""
    body = json.loads(exchange.body)
    options = body.get("stream_options") or {}
    if not body.get("stream"):
        await exchange.answer(json.dumps({"choices": [{"text": "x"}], "usage": USAGE}).encode())
        return
    await exchange.start(SSE)
    for number in range(5):
        text = 'it said "usage"' if number == 3 else "x"
        event: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}}]}
        if options.get("include_usage") and options.get("continuous_usage_stats"):
            event["usage"] = USAGE
        await exchange.chunk(render(event))
    end = render({"choices": [], "usage": USAGE}) if options.get("include_usage") else b""
    if body.get("user") == "in one piece":
        await exchange.chunk(end + b"data: [DONE]\n\n")
    else:
        if end:
            await exchange.chunk(end)
        await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.end()


def read_usage(front: Gateway, key: str = "agents") -> dict[str, Any]:
    return front.ask_admin("/admin/usage").json()["keys"][key]


def tally(requests: int = 0, prompt: int = 0, output: int = 0, refused: int = 0) -> dict[str, int]:
    return {"requests": requests, "prompt_tokens": prompt, "output_tokens": output, "refused": refused}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "body",
    [
        {"stream": True},
        {"stream": True, "user": "in one piece"},
        {"stream": True, "stream_options": None},
        {"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream": False, "stream_options": None},
    ],
    ids=["plain", "in-one-piece", "null", "no-usage", "usage", "continuous", "no-stream"],
)
def test_client_gets_what_it_asked_for_and_the_key_is_charged(path: str, body: dict[str, Any]) -> None:
    data = json.dumps({"model": "m", **body}).encode()
    asks = {"ask_usage": True}
    with (
        Upstream({path: answer}) as engine,
        gateway(engine, keys=[make_key()], model=asks) as front,
        gateway(engine) as open_front,
    ):
        through = front.ask(path, data, KEY + "accept-encoding: gzip\r\n")
        direct = open_front.ask(path, data)
        assert (through.status, through.body) == (200, direct.body)
        assert through.chunks == direct.chunks
        front.wait_idle()
        usage = read_usage(front)
        assert usage["today"] == usage["since_start"] == {"m": tally(1, 11, 5)}
        assert (usage["tokens_today"], usage["reserved_tokens"], usage["in_flight"]) == (16, 0, 0)
        first, second = engine.seen
        assert second.body == data, "without keys nothing is asked for"
        changed = json.loads(first.body)
        given = changed.pop("stream_options", None)
        assert changed == {name: value for name, value in json.loads(data).items() if name != "stream_options"}
        asked = body["stream"] and not (body.get("stream_options") or {}).get("include_usage")
        assert first.body == data or given["include_usage"] is True
        assert ("accept-encoding" in dict(read_headers(first.head))) != asked, "what is read may not be compressed"
        text = front.ask("/metrics", headers=KEY).body.decode()
        assert 'laguna_gateway_key_output_tokens_total{key="agents",model="m"} 5.0' in text
        assert 'laguna_gateway_key_tokens_today{key="agents"} 16.0' in text


def test_streams_are_as_they_are_by_default() -> None:
    data = b'{"model": "m", "stream": true}'
    with (
        Upstream({CHAT: answer}) as engine,
        gateway(engine, keys=[make_key()]) as front,
    ):
        assert front.ask(CHAT, data, KEY).status == 200
        assert engine.seen[0].body == data
        front.wait_idle()
        assert read_usage(front)["today"] == {"m": tally(1, -(-len(data) // 4), 6)}, (
            "a token per piece, and its estimate"
        )


@pytest.mark.parametrize(
    ("events", "left"),
    [
        (b'data: {"choices":[],"usage":{}}\n\n', b""),
        (b'data: {"choices":[],"usage":null}\n\n', None),
        (b'data: {"choices":[{"text":"\\"usage\\""}]}\n\n', None),
        (b'data: {"choices":[{"text":""}],"usage":{}}\n\n', None),
        (b'data: {"usage":{}}\n\n', None),
        (b'data: {"usage": [\n\n', None),
        (b'event: x\ndata: {"choices":[],"usage":{}}\n\n', None),
        (b': "usage"\n\ndata: {"choices":[],"usage":{}}\n\ndata: 1\n\n', b': "usage"\n\ndata: 1\n\n'),
        (b'data: 1\r\n\r\ndata: {"choices": [], "usage": {}}\r\n\r\n', b"data: 1\r\n\r\n"),
    ],
)
def test_nothing_but_the_usage_is_dropped(events: bytes, left: bytes | None) -> None:
    assert drop_usage(events) == (events if left is None else left)


async def stall(exchange: Exchange) -> None:
    await exchange.start(SSE)
    for _ in range(3):
        await exchange.chunk(render({"choices": [{"index": 0}]}))
        await asyncio.sleep(0.02)
    await asyncio.sleep(30)


async def repeat_tools(exchange: Exchange) -> None:
    """As vLLM begins /v1/responses."""
    await exchange.start(SSE)
    tools = [{"parameters": {"input_tokens": 1, "output_tokens": 10**30}}]
    await exchange.chunk(render({"type": "response.created", "response": {"tools": tools, "usage": None}}))
    await asyncio.sleep(0.02)
    exchange.abort()


async def exaggerate(exchange: Exchange) -> None:
    await exchange.answer(b'{"usage": {"prompt_tokens": 2, "completion_tokens": %b}}' % (b"9" * 5000))


async def cut(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(render({"choices": [{"index": 0}]}))
    await asyncio.sleep(0.02)
    exchange.abort()


async def refuse(exchange: Exchange) -> None:
    await exchange.answer(b'{"error": {"message": "no"}}', status="400 Bad Request")


async def die(exchange: Exchange) -> None:
    exchange.abort()


BODY = b'{"model": "m", "stream": true, "max_tokens": 50}'
PROMPT = len(BODY) // 4


def test_client_that_leaves_gives_its_reservation_back() -> None:
    limits = {"tokens_per_day": 100, "tokens_per_minute": 1000, "max_in_flight": 1}
    with Upstream({CHAT: stall}) as engine, gateway(engine, keys=[make_key(**limits)]) as front:
        with front.connect() as connection:
            connection.sendall(make_request(CHAT, BODY, KEY))
            data = b""
            while data.count(b"choices") < 3:
                data += connection.recv(4096)
            assert read_usage(front)["reserved_tokens"] == PROMPT + 50
            assert front.ask(CHAT, BODY, KEY).status == 429
        front.wait_idle()
        usage = read_usage(front)
        assert (usage["in_flight"], usage["reserved_tokens"], usage["tokens_today"]) == (0, 0, PROMPT + 3)
        assert usage["today"] == {"": tally(refused=1), "m": tally(1, PROMPT, 3)}


@pytest.mark.parametrize(
    ("handler", "status", "charged"),
    [(cut, 200, tally(1, PROMPT, 1)), (refuse, 400, tally(1)), (die, 502, tally(1))],
)
def test_answer_that_fails_is_charged_for_what_came(handler: Any, status: int, charged: dict[str, int]) -> None:
    with Upstream({CHAT: handler}) as engine, gateway(engine, keys=[make_key(tokens_per_day=100)]) as front:
        assert front.ask(CHAT, BODY, KEY).status == status
        front.wait_idle()
        usage = read_usage(front)
        assert (usage["today"], usage["reserved_tokens"]) == ({"m": charged}, 0)


def test_what_a_request_says_of_usage_is_not_believed() -> None:
    key = make_key(tokens_per_day=1000)
    with Upstream({"/v1/responses": repeat_tools}) as engine, gateway(engine, keys=[key]) as front:
        assert front.ask("/v1/responses", BODY, KEY).status == 200
        front.wait_idle()
        assert read_usage(front)["today"] == {"m": tally(1, PROMPT, 1)}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/messages/count_tokens", b'{"model": "m", "messages": []}'), ("/v1/responses/resp_1", None)]
)
def test_what_makes_no_tokens_costs_none(path: str, body: bytes | None) -> None:
    """To count them, or to read again what was made before, whatever such an answer says."""

    async def count(exchange: Exchange) -> None:
        await exchange.answer(b'{"input_tokens": 900, "usage": {"input_tokens": 900, "output_tokens": 9}}')

    with Upstream({path: count}) as engine, gateway(engine, keys=[make_key(tokens_per_day=1000)]) as front:
        for _ in range(2):
            assert front.ask(path, body, KEY).status == 200
        front.wait_idle()
        usage = read_usage(front)
        assert (usage["today"], usage["tokens_today"]) == ({"m": tally(2)}, 0)
        assert [engine.stats.prompt_tokens for engine in front.relay.pools["m"].engines] == [0]


@pytest.mark.parametrize("cut", [0, 8, 30], ids=["whole", "in-the-first", "in-the-second"])
def test_usage_is_found_where_much_follows_it(cut: int) -> None:
    """vLLM's chats have the prompt's token ids and log-probabilities behind it."""

    async def chat(exchange: Exchange) -> None:
        usage = b'"usage":{"prompt_tokens":11,"completion_tokens":5}'
        pieces = [
            b'{"choices":[],' + usage[:cut],
            usage[cut:] + b',"prompt_token_ids":[',
            *[b"1234," * 100] * 3,
            b"0]}",
        ]
        await exchange.start("content-type: application/json\r\ntransfer-encoding: chunked\r\n")
        for piece in pieces:
            await exchange.chunk(piece)
            await asyncio.sleep(0.01)
        await exchange.end()

    with Upstream({CHAT: chat}) as engine, gateway(engine, keys=[make_key(tokens_per_day=1000)]) as front:
        assert front.ask(CHAT, b'{"model": "m"}', KEY).status == 200
        front.wait_idle()
        assert read_usage(front)["today"] == {"m": tally(1, 11, 5)}


def test_number_that_is_no_count_is_as_none() -> None:
    key = make_key(tokens_per_day=1000, max_in_flight=1)
    with Upstream({CHAT: exaggerate}) as engine, gateway(engine, keys=[key]) as front:
        for _ in range(2):
            assert front.ask(CHAT, b'{"model": "m", "max_tokens": 50}', KEY).status == 200
            front.wait_idle()
        assert read_usage(front)["today"] == {"m": tally(2, 4, 0)}


def test_body_that_never_comes_costs_nothing() -> None:
    with Upstream() as engine, gateway(engine, keys=[make_key(max_in_flight=1)]) as front:
        with front.connect() as connection:
            connection.sendall(make_request(CHAT, BODY, KEY)[:-10])
            wait_until(lambda: read_usage(front)["in_flight"] == 1)
        front.wait_idle()
        assert read_usage(front)["today"] == {}
        assert front.ask(CHAT, BODY, KEY).status == 200


def test_limits_are_told_with_a_stream_and_instead_of_a_providers() -> None:
    async def provide(exchange: Exchange) -> None:
        await exchange.start(SSE + "x-ratelimit-limit-requests: 9\r\nx-ratelimit-limit-images: 8\r\n")
        await exchange.chunk(render({"choices": [{"index": 0}]}))
        await exchange.end()

    body = b'{"model": "m", "stream": true, "max_tokens": 100}'
    key = make_key(requests_per_minute=3, tokens_per_minute=1000)
    with Upstream({CHAT: provide}) as engine, gateway(engine, keys=[key]) as front:
        for left in ("2", "1"):
            reply = front.ask(CHAT, body, KEY)
            limits = {name: value for name, value in reply.headers if name.startswith("x-ratelimit-")}
            assert limits["x-ratelimit-limit-requests"] == "3"
            assert limits["x-ratelimit-remaining-requests"] == left
            assert limits["x-ratelimit-limit-tokens"] == "1000"
            assert len(limits) == 6


def test_limits_are_told_with_every_answer_and_instead_of_a_providers() -> None:
    async def provide(exchange: Exchange) -> None:
        headers = (
            "x-ratelimit-limit-requests: 9\r\nx-ratelimit-remaining-tokens: 8\r\ncontent-type: application/json\r\n"
        )
        await exchange.answer(json.dumps({"usage": USAGE}).encode(), headers)

    keys = [make_key(requests_per_minute=3, tokens_per_minute=100_000, tokens_per_day=200), make_key("free", "sk2")]
    body = b'{"model": "m", "max_tokens": 100}'
    with Upstream({CHAT: provide}) as engine, gateway(engine, keys=keys) as front:
        first = front.ask(CHAT, body, KEY)
        assert first.header("x-ratelimit-limit-requests") == "3"
        assert first.header("x-ratelimit-remaining-requests") == "2"
        assert first.header("x-ratelimit-reset-requests") in ("20s", "21s")
        assert first.header("x-ratelimit-limit-tokens") == "200"
        assert int(first.header("x-ratelimit-remaining-tokens") or 0) == 200 - 100 - -(-len(body) // 4)
        assert [name for name, _ in first.headers].count("x-ratelimit-limit-requests") == 1
        missing = front.ask("/v1/nothing/../x", headers=KEY)
        assert (missing.status, missing.header("x-ratelimit-remaining-requests")) == (400, "1")
        refused = front.ask(CHAT, b'{"model": "m", "max_tokens": 185}', KEY)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert int(refused.header("retry-after") or 0) > 0
        assert refused.header("x-ratelimit-remaining-tokens") == "184"
        over = front.ask(CHAT, body, KEY)
        assert (over.status, over.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert over.header("x-ratelimit-remaining-requests") == "0"
        free = front.ask(CHAT, body, "x-api-key: sk2\r\n")
        assert free.header("x-ratelimit-limit-requests") == "9", "where the gateway has no limit the provider's passes"
        text = front.ask("/metrics", headers="x-api-key: sk2\r\n").body.decode()
        assert 'laguna_gateway_key_refused_total{key="agents",model="m"} 1.0' in text
        assert 'laguna_gateway_key_budget_left_tokens{key="agents"} 184.0' in text
        assert 'laguna_gateway_key_budget_left_tokens{key="free"}' not in text


def test_refusals_have_the_form_of_the_api_that_is_asked() -> None:
    body = b'{"model": "m", "max_tokens": 2000, "messages": []}'
    with Upstream() as engine, gateway(engine, keys=[make_key(tokens_per_minute=2100)]) as front:
        assert front.ask(MESSAGES, body, KEY).status == 200
        refused = front.ask(MESSAGES, body, KEY)
        assert refused.json()["type"] == "error"
        assert (refused.status, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        hidden = front.ask(MESSAGES, b'{"model": "n"}', KEY)
        assert (hidden.status, hidden.json()["error"]["type"]) == (404, "not_found_error")


def list_models(front: Gateway, headers: str) -> list[str]:
    return [card["id"] for card in front.ask("/v1/models", headers=headers).json()["data"]]


async def list_adapter(exchange: Exchange) -> None:
    await exchange.answer(json.dumps({"data": [{"id": "m"}, {"id": "adapter"}]}).encode())


def test_key_sees_and_asks_for_its_models_alone() -> None:
    keys = [make_key(models=["m"]), make_key("other", "sk2", models=["adapter"]), make_key("all", "sk3")]
    keys.append(make_key("none", "sk4", models=["gone"]))
    with Upstream({"/v1/models": list_adapter}) as engine, Upstream() as second:
        models = [
            {"name": "m", "aliases": ["alias"], "upstreams": [{"name": "a", "url": engine.url}]},
            {"name": "n", "upstreams": [{"name": "b", "url": second.url}]},
        ]
        with gateway(models=models, keys=keys) as front:
            own, adapter, every, none = (f"x-api-key: {secret}\r\n" for secret in ("sk", "sk2", "sk3", "sk4"))
            assert list_models(front, own) == ["m", "alias", "adapter"]
            assert list_models(front, adapter) == ["adapter"]
            assert list_models(front, every) == ["m", "alias", "adapter", "n"]
            assert list_models(front, none) == []

            def ask(name: str, headers: str) -> int:
                return front.ask(CHAT, json.dumps({"model": name}).encode(), headers).status

            assert [ask(name, own) for name in ("m", "alias", "adapter", "n", "x")] == [200, 200, 200, 404, 404]
            assert [ask(name, adapter) for name in ("m", "alias", "adapter", "n")] == [404, 404, 200, 404]
            assert [front.ask(f"/v1/models/{name}", headers=own).status for name in ("m", "n", "x")] == [200, 404, 404]
            hidden = front.ask(CHAT, b'{"model": "n"}', own).body
            unknown = front.ask(CHAT, b'{"model": "x"}', own).body
            assert hidden.replace(b"`n`", b"`x`") == unknown, "a key learns nothing of models that are not its own"
            assert front.ask("/version", headers=own).json()["line"].startswith("GET /version")
            assert front.ask("/version", headers=none).status == 404
            text = front.ask("/metrics", headers=every).body.decode()
            assert 'laguna_gateway_refusals_total{key="agents",reason="model_not_allowed"} 3.0' in text


def test_only_model_is_listed_by_the_gateway_for_a_key_with_models() -> None:
    with (
        Upstream({"/v1/models": list_adapter}) as engine,
        gateway(engine, keys=[make_key(models=["adapter"]), make_key("all", "sk2")]) as front,
    ):
        assert list_models(front, KEY) == ["adapter"]
        assert list_models(front, "x-api-key: sk2\r\n") == ["m", "adapter"]


def test_revoked_key_finishes_what_is_in_flight_and_its_name_keeps_its_use(tmp_path: Any) -> None:
    release = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await release.wait()
        await exchange.answer(json.dumps({"usage": USAGE}).encode())

    with Upstream({CHAT: hold}) as engine, gateway(engine, keys=[make_key(tokens_per_day=1000)]) as front:
        config = front.relay.config
        with front.connect() as connection:
            connection.sendall(make_request(CHAT, b'{"model": "m"}', KEY))
            wait_until(lambda: len(engine.seen) == 1)
            without = config.model_copy(update={"keys": (config.keys[0].model_copy(update={"name": "other"}),)})
            front.server.call(lambda relay: relay.configure(without))
            engine._loop.call_soon_threadsafe(release.set)
            assert read_reply(connection).status == 200
        front.wait_idle()
        assert front.ask(CHAT, b'{"model": "m"}', KEY).status == 200
        assert set(front.ask_admin("/admin/usage").json()["keys"]) == {"other"}
        front.server.call(lambda relay: relay.configure(config))
        assert read_usage(front)["tokens_today"] == 16


def test_labels_are_names_of_the_configuration_alone() -> None:
    with Upstream() as engine, gateway(engine, keys=[make_key()]) as front:
        for number in range(20):
            front.ask(CHAT, json.dumps({"model": f"made-up-{number}"}).encode(), KEY)
            front.ask(CHAT, b'{"model": "m"}', f"x-api-key: wrong-{number}\r\n")
        assert front.ask(CHAT, b'{"model": "m"}', KEY).status == 200
        front.wait_idle()
        text = front.ask("/metrics", headers=KEY).body.decode()
        assert "made-up" not in text
        assert set(re.findall(r"laguna_gateway_key_\w+_total{(.*)}", text)) == {'key="agents",model="m"'}
