"""Priorities: who goes first in the gateway's queue, and what engines are told."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
from gateway_fakes import Exchange, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.access.asked import read_asked
from laguna_serve.serving.gateway.access.edits import find_priority, set_priority
from laguna_serve.serving.gateway.engines.waiting import WaitingLine

CHAT = "/v1/chat/completions"


def make_key(name: str, priority: int) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "priority": priority}


def test_queue_goes_by_priority_then_by_arrival() -> None:
    gate = asyncio.Semaphore(0)
    order = []

    async def hold(exchange: Exchange) -> None:
        order.append(json.loads(exchange.body)["user"])
        await gate.acquire()
        await exchange.answer(b"{}")

    keys = [make_key("late", 10), make_key("usual", 0), make_key("soon", -5)]
    with Upstream({CHAT: hold}) as engine, gateway(engine, keys=keys, upstream={"max_in_flight": 1}) as front:
        waiting = []
        asked = ["usual 0", "late 1", "usual 2", "soon 3", "usual 4", "soon 5", "late 6"]
        for number, name in enumerate(asked):
            connection = front.connect()
            more = {"priority": 50} if name == "soon 5" else {"priority": -50} if name == "late 6" else {}
            body = json.dumps({"model": "m", "user": name, **more}).encode()
            connection.sendall(make_request(CHAT, body, f"x-api-key: {name.split()[0]}\r\n"))
            waiting.append(connection)
            wait_until(lambda number=number: sum(p.queued for p in front.relay.pools.values()) == number)  # type: ignore[misc]
        waiting[4].close()  # who leaves is passed over
        wait_until(lambda: sum(p.queued for p in front.relay.pools.values()) == 5)
        for _ in range(6):
            engine._loop.call_soon_threadsafe(gate.release)
        for connection in waiting[:4] + waiting[5:]:
            assert read_reply(connection).status == 200
            connection.close()
        front.wait_idle()
    # "soon 5" has lowered its own, "late 6" could not raise its own.
    assert order == ["usual 0", "soon 3", "usual 2", "late 1", "late 6", "soon 5"]


@pytest.mark.parametrize(
    ("path", "body", "own", "sent"),
    [
        (CHAT, b'{"model": "m"}', 0, b'{"model": "m"}'),
        (CHAT, b'{"model": "m"}', 7, b'{"priority":7,"model": "m"}'),
        (CHAT, b' { "model": "m"}', -7, b' {"priority":-7, "model": "m"}'),
        ("/v1/responses", b"{}", 7, b'{"priority":7}'),
        (CHAT, b'{"priority": 9, "x": 1.0}', 7, b'{"priority": 9, "x": 1.0}'),
        (CHAT, b'{"priority": 0, "x": 1.0}', 7, b'{"priority": 7, "x": 1.0}'),
        (CHAT, b'{"priority": -3}', 0, b'{"priority": 0}'),
        (CHAT, b'{"priority": "high"}', 1, b'{"priority": 1}'),
        (CHAT, b'{"a": NaN, "priority": 1}', 2, b'{"a": NaN, "priority": 2}'),
        (CHAT, b"[]", 7, b"[]"),
        ("/v1/messages", b'{"model": "m"}', 7, b'{"model": "m"}'),
    ],
)
def test_engine_is_told_the_priority_that_counts(path: str, body: bytes, own: int, sent: bytes) -> None:
    asked = read_asked(body, b"application/json")
    assert set_priority(path, body, asked, find_priority(asked, own)) == sent


def test_what_is_not_changed_keeps_its_bytes() -> None:
    """Messages may be millions: they are neither decoded nor written anew."""
    given = b'{"model":"m", "messages" :[ {"content" :  "\\u00e9"} ,1e2], "priority":1, "n":1.0}'
    changed = set_priority("/v1/chat/completions", given, read_asked(given, b""), 7)
    assert b'[ {"content" :  "\\u00e9"} ,1e2]' in changed
    assert json.loads(changed) == {**json.loads(given), "priority": 7}


def test_priority_is_passed_on_where_the_model_says_so() -> None:
    body = b'{"model": "m", "stream": true}'
    for passes in (True, False):
        with (
            Upstream() as engine,
            gateway(engine, keys=[make_key("k", 3)], model={"pass_priority": passes, "ask_usage": True}) as front,
        ):
            seen = json.loads(front.ask(CHAT, body, "x-api-key: k\r\n").json()["body"])
            assert seen.pop("stream_options") == {"include_usage": True}
            assert seen == {"model": "m", "stream": True} | ({"priority": 3} if passes else {})


def test_without_keys_a_clients_priority_is_the_engines_business() -> None:
    with Upstream() as engine, gateway(engine, model={"pass_priority": True}) as front:
        assert front.ask(CHAT, b'{"priority": -3}').json()["body"] == '{"priority": -3}'


def test_line_forgets_those_that_were_limited() -> None:
    line = WaitingLine()
    with line.draw(0, limited=True), line.draw(0, limited=False):
        assert (line.length, line.limited) == (2, 1)
    assert (line.length, line.limited) == (0, 0)
