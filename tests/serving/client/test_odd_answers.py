"""Answers that no vLLM gives, as gateways and other servers do: one line each, whatever they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from aiohttp import web
from mock_engine import MockServer

from laguna_serve.serving.client import closed_loop, completions
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.counters import Counters, scrape_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt, RawStream, Record, decode_stream

LATIN = "Zugriff verweigert: gesperrt für Sie".encode("latin-1")


class OddServer(MockServer):
    """Answers everything with the same bytes."""

    def __init__(self, body: bytes, status: int) -> None:
        super().__init__()
        self._body, self._status = body, status

    def routes(self) -> list[web.RouteDef]:
        return [web.route("*", "/{path:.*}", self._answer)]

    async def _answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self._body, status=self._status, content_type="application/json")


@contextmanager
def odd(body: bytes, status: int = 200) -> Iterator[str]:
    with OddServer(body, status) as server:
        yield server.url


@pytest.mark.parametrize(
    "body",
    [b'{"choices": []}', b"[]", b'{"choices": [{"token_ids": [1], "logprobs": {"top_logprobs": [null]}}]}', LATIN],
)
def test_probe_of_an_odd_answer_is_one_line(body: bytes) -> None:
    async def probe(url: str) -> None:
        async with open_session() as session:
            await Client(session, url, "fake", 1).probe("p")

    with odd(body) as url, pytest.raises(EndpointError, match="expected vLLM's answer, got"):
        asyncio.run(probe(url))


ABORTED = (
    b'{"choices": [{"token_ids": [1], "text": "a", "logprobs": {"top_logprobs": [{"1": -1.0}]}, "finish_reason": %s}]}'
)


@pytest.mark.parametrize("reason", [b'"abort"', b'"error"', b'"content_filter"', b'"gone away"'])
def test_an_answer_that_was_broken_off_is_none(reason: bytes) -> None:
    """vLLM answers 200 for requests that it aborts, with what there is of a text."""

    async def probe(url: str) -> None:
        async with open_session() as session:
            await Client(session, url, "fake", 1).probe("p")

    named = reason.decode().strip('"')
    with odd(ABORTED % reason) as url, pytest.raises(EndpointError, match=f"got finish_reason '{named}'"):
        asyncio.run(probe(url))
    event = b"data: " + ABORTED % reason + b"\n\ndata: [DONE]\n\n"
    record = decode_stream(RawStream("p", 0, 9, [(1, event)]))
    assert record.error == f"stream: expected a whole answer, got finish_reason '{named}' after 1 tokens"


@pytest.mark.parametrize("reason", [b'"stop"', b'"length"', b'"repetition"', b'"eos_token"', b'"STOP"', b"null", b"7"])
def test_an_answer_that_ended_is_one_whatever_its_server_calls_that(reason: bytes) -> None:
    assert (
        decode_stream(RawStream("p", 0, 9, [(1, b"data: " + ABORTED % reason + b"\n\ndata: [DONE]\n\n")])).error is None
    )


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"17.5"])
def test_what_is_no_log_probability_is_refused(value: bytes) -> None:
    """NaN is neither a difference nor one beyond rounding: such answers would be certified. Logits are none."""
    body = b'{"choices": [{"token_ids": [1], "logprobs": {"top_logprobs": [{"1": %s}]}, "prompt_logprobs": [null, '
    body += b'{"1": {"logprob": %s, "rank": 1}}]}]}'

    async def ask(url: str) -> None:
        async with open_session() as session:
            client = Client(session, url, "fake", 1)
            for answer in (client.probe("p"), client.score(Prompt("a", "p")), client.score_top([1, 1], 1)):
                with pytest.raises(
                    EndpointError, match=r"got ValueError: a log-probability (that is -?(nan|inf)|of 17.5; serve)"
                ):
                    await answer

    with odd(body % (value, value)) as url:
        asyncio.run(ask(url))


class CommentServer(MockServer):
    """Sends comments alone, as a proxy before an engine that hangs; `may_end` ends them, a bound in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = False

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/completions", self._answer)]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(20_000):
            if self.may_end:
                break
            await response.write(b": keep-alive\n\n")
            await asyncio.sleep(0)
        return response


def test_comments_alone_do_not_keep_a_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(url: str) -> list[Record]:
        async with open_session() as session:
            monkeypatch.setattr(completions, "SILENCE_S", 0.0)
            return await Client(session, url, "fake", 1).run_round([Prompt("a", "p")])

    with CommentServer() as server:
        assert asyncio.run(ask(server.url))[0].error == "TimeoutError: nothing but comments for 0 s"


def test_a_round_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was said of a benchmark's streams for the ten minutes until they gave up."""
    monkeypatch.setattr(closed_loop, "QUIET_S", 1e-3)
    said: list[str] = []

    async def ask(server: CommentServer) -> None:
        def say(line: str) -> None:
            said.append(line)
            server.may_end = True

        monkeypatch.setattr(completions, "run_closed_loop", partial(closed_loop.run_closed_loop, say=say))
        async with open_session() as session:
            await Client(session, server.url, "fake", 1).run_round([Prompt("a", "p"), Prompt("b", "q")])

    with CommentServer() as server:
        asyncio.run(ask(server))
    assert said[0] == "no answer for 0 s; 2 requests in flight"


def test_refusal_in_another_encoding_is_a_failed_request() -> None:
    async def ask(url: str) -> list[Record]:
        async with open_session() as session:
            return await Client(session, url, "fake", 1).run_round([Prompt("a", "p")])

    with odd(LATIN, 503) as url:
        assert asyncio.run(ask(url))[0].error == "HTTP 503: Zugriff verweigert: gesperrt f\ufffdr Sie"


def test_counters_beside_other_bytes_are_read() -> None:
    async def scrape(url: str) -> Counters:
        async with open_session() as session:
            return await scrape_counters(session, url)

    with odd(b"# HELP x f\xfcr\nvllm:generation_tokens_total 3\n") as url:
        assert asyncio.run(scrape(url)).generation_tokens == 3
