"""One endpoint: both formats, what is sent, what comes back, and failures in one line."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mock_engine import answering

from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.openai_endpoint import Answer, Endpoint, Form

VERSIONS = {"X-Weight-Version": "7", "X-Draft-Version": "3"}


def ask(url: str, form: Form, key: str | None = None, retries: int = 0, **sampling: Any) -> Answer:
    async def run() -> Answer:
        async with Endpoint(url, api_key=key, retries=retries) as endpoint:
            assert endpoint.model == "fake"
            return await endpoint.ask("Hello", form, sampling)

    return asyncio.run(run())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_chat_and_completion(suffix: str) -> None:
    with answering(lambda body: "é", VERSIONS) as server:
        for form in ("chat", "completion"):
            answer = ask(server.url + suffix, form, temperature=0, top_k=5)
            assert answer == Answer("é", "stop", 7, VERSIONS)
    assert server.bodies[0] == {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "top_k": 5,
    }
    assert server.bodies[1] == {"model": "fake", "prompt": "Hello", "temperature": 0, "top_k": 5}


def test_key_is_sent_and_versions_may_be_missing() -> None:
    with answering(lambda body: "") as server:
        assert ask(server.url, "chat", key="secret") == Answer("", "stop", 7, {})
    assert server.keys == ["Bearer secret"]


def test_passing_trouble_is_retried() -> None:
    statuses = [503, 200]
    with answering(lambda body: 503 if statuses.pop(0) == 503 else "fine") as server:
        assert ask(server.url, "chat", retries=1).text == "fine"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 500])
def test_refusal_is_told_in_one_line(status: int) -> None:
    with answering(lambda body: status) as server, pytest.raises(EndpointError) as caught:
        ask(server.url, "chat")
    assert f"HTTP {status}: " in str(caught.value)
    assert "no luck" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_endpoint_that_is_not_there_is_told_on_entering() -> None:
    with answering(lambda body: "") as server:
        pass
    with pytest.raises(EndpointError, match=r"expected a list of models, got APIConnectionError.*is the server up\?"):
        ask(server.url, "chat")


def test_messages_and_log_probabilities_are_asked_for() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

    async def run(url: str) -> list[Answer]:
        async with Endpoint(url, retries=0) as endpoint:
            return [await endpoint.ask(messages, "chat", {}, top=5), await endpoint.ask("x", "completion", {}, top=5)]

    with answering(lambda body: "é") as server:
        answers = asyncio.run(run(server.url))
    assert server.bodies[0] == {"model": "fake", "messages": messages, "logprobs": True, "top_logprobs": 5}
    assert server.bodies[1] == {"model": "fake", "prompt": "x", "logprobs": 5}
    assert [answer.top for answer in answers] == [None, None], "this server gives none"
