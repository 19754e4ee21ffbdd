"""Shadow traffic: copies of greedy requests, compared token by token; the client waits for none of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from gateway_fakes import NOBODY, SSE, Exchange, Gateway, Handler, Upstream, gateway, wait_until

from laguna_serve.serving.gateway.relay import shadow
from laguna_serve.serving.gateway.relay.shadow import find_difference, read_answer

PATH = "/v1/completions"
GREEDY = json.dumps({"model": "m", "prompt": "x", "temperature": 0}).encode()


def say(*token_ids: int, stream: bool = False, delay_s: float = 0.0) -> Handler:
    async def answer(exchange: Exchange) -> None:
        await asyncio.sleep(delay_s)
        events = [{"choices": [{"text": f"t{token}", "token_ids": [token]}]} for token in token_ids]
        if not stream:
            whole = {"text": "".join(f"t{t}" for t in token_ids), "token_ids": list(token_ids)}
            await exchange.answer(json.dumps({"choices": [whole]}).encode())
            return
        await exchange.start(SSE)
        for event in events:
            await exchange.chunk(f"data: {json.dumps(event)}\n\n".encode())
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.end()

    return answer


def outcomes(front: Gateway) -> dict[str, float]:
    text = front.ask("/metrics").body.decode()
    lines = [line for line in text.splitlines() if line.startswith("laguna_gateway_shadow_requests_total{")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def run(main: Handler, other: Handler, body: bytes = GREEDY) -> dict[str, float]:
    with Upstream({PATH: main}) as engine, Upstream({PATH: other}) as second:
        shadows = [{"name": "s", "url": second.url}]
        with gateway(engine, model={"shadows": shadows}) as front:
            assert front.ask(PATH, body).status in (200, 500)
            deadline = time.monotonic() + 5
            while not (found := outcomes(front)) and time.monotonic() < deadline:
                time.sleep(0.01)
            front.wait_idle()
            return found


@pytest.mark.parametrize("stream", [False, True])
def test_equal_answers(stream: bool) -> None:
    assert run(say(1, 2, 3, stream=stream), say(1, 2, 3, stream=stream)) == {"equal": 1.0}


def test_different_answers_are_told_by_place_and_not_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(say(1, 2, 3, stream=True), say(1, 2, 4)) == {"different": 1.0}
    line = next(line for line in capsys.readouterr().err.splitlines() if "first_difference" in line)
    found = json.loads(line)
    assert (found["shadow"], found["model"], found["first_difference"]) == ("s", "m", 2)
    assert "t4" not in line


def test_answers_are_compared_beside_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    read = shadow.read_answer

    def note(body: bytes) -> list[Any]:
        threads.append(threading.get_ident())
        return read(body)

    monkeypatch.setattr(shadow, "read_answer", note)
    with (
        Upstream({PATH: say(1)}) as engine,
        Upstream({PATH: say(1)}) as second,
        gateway(engine, model={"shadows": [{"name": "s", "url": second.url}]}) as front,
    ):
        assert front.ask(PATH, GREEDY).status == 200
        wait_until(lambda: outcomes(front) == {"equal": 1.0})
        front.server.call(lambda _: threads.append(threading.get_ident()))
    assert len(threads) == 3
    assert threads[-1] not in threads[:-1]


def test_only_what_makes_an_answer_is_copied() -> None:
    """OPTIONS needs no key: copies of it would be asked with the shadow's."""

    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status="405 Method Not Allowed")

    with (
        Upstream({PATH: refuse}) as engine,
        Upstream({PATH: say(1)}) as second,
        gateway(engine, model={"shadows": [{"name": "s", "url": second.url}]}) as front,
    ):
        assert front.ask(PATH, GREEDY, method="OPTIONS").status == 405
        assert front.ask(PATH, GREEDY).status == 405
        wait_until(lambda: outcomes(front) == {"failed": 1.0})
        assert len(second.seen) == 1


def test_answer_of_another_model_is_not_compared() -> None:
    with Upstream({PATH: say(9)}) as other, Upstream({PATH: say(1)}) as second:
        shadows = [{"name": "s", "url": second.url}]
        models = [
            {"name": "m", "upstreams": [{"name": "m-a", "url": NOBODY}], "shadows": shadows, "fallback": ["other"]},
            {"name": "other", "upstreams": [{"name": "other-a", "url": other.url}]},
        ]
        with gateway(models=models) as front:
            assert front.ask(PATH, GREEDY).header("x-fallback-from") == "m"
            wait_until(lambda: outcomes(front) == {"left_out": 1.0})


def test_shadow_that_fails_changes_nothing() -> None:
    async def die(exchange: Exchange) -> None:
        exchange.abort()

    assert run(say(1), die) == {"failed": 1.0}


@pytest.mark.parametrize("body", [b'{"choices": [1]}', b'{"choices": [{"delta": "a"}]}', b"[" * 100_000])
def test_what_is_no_completion_counts_as_failed(body: bytes) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(body)

    assert run(say(1), answer) == {"failed": 1.0}


def test_request_that_fails_is_not_compared() -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status="500 No")

    assert run(refuse, say(1)) == {"failed": 1.0}


@pytest.mark.parametrize("of", ["answer", "shadow", "request"])
def test_what_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """Also where both say the same as far as they are kept."""
    long = range(100, 300)
    monkeypatch.setattr(shadow, "MOST_BYTES", 4000)
    body = json.dumps({"model": "m", "prompt": "x" * (4000 if of == "request" else 1), "temperature": 0}).encode()
    answers = [say(*(long if of == one else (1,)), stream=True) for one in ("answer", "shadow")]
    assert run(*answers, body) == {"left_out": 1.0}


@pytest.mark.slow
def test_client_does_not_wait_for_the_shadow() -> None:
    with (
        Upstream({PATH: say(1)}) as engine,
        Upstream({PATH: say(1, delay_s=1.0)}) as second,
        gateway(engine, model={"shadows": [{"name": "s", "url": second.url}]}) as front,
    ):
        started = time.monotonic()
        assert front.ask(PATH, GREEDY).status == 200
        assert time.monotonic() - started < 0.5
        wait_until(lambda: outcomes(front) == {"equal": 1.0})


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "prompt": "x"},
        {"model": "m", "prompt": "x", "temperature": 0.7},
        {"model": "m", "prompt": "x", "temperature": 0, "n": 2},
    ],
)
def test_what_is_not_greedy_is_not_copied(body: dict[str, Any]) -> None:
    with (
        Upstream({PATH: say(1)}) as engine,
        Upstream({PATH: say(1)}) as second,
        gateway(engine, model={"shadows": [{"name": "s", "url": second.url}]}) as front,
    ):
        assert front.ask(PATH, json.dumps(body).encode()).status == 200
        front.wait_idle()
        assert second.seen == []


def test_text_is_compared_where_there_are_no_tokens() -> None:
    chat = b': a comment\n\ndata: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    chat += b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9"}}]}\n\n'
    whole = b'{"choices":[{"message":{"content":"cafe"}}]}'
    assert find_difference(read_answer(chat), read_answer(whole)) == 3
    assert find_difference([1, 2], [1, 2, 3]) == 2
    assert find_difference([1, 2], [1, 2]) is None
    with pytest.raises(ValueError, match="an error"):
        read_answer(b'data: {"error": {}}\n\n')
