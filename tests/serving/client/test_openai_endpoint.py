"""One endpoint: both formats, what is sent, what comes back, and failures in one line."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from mock_engine import MockEngine, Settings, answering

from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.openai_endpoint import Answer, Endpoint, Form, _describe

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


def say(text: Any) -> Any:
    """A whole answer of both formats, which the mock sends as it is."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice]}


def test_text_in_parts_is_put_together() -> None:
    """As servers answer that give a reasoning model's thoughts as parts of their own."""
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "é"}, {"type": "text", "text": "!"}]
    with answering(lambda body: say(parts)) as server:
        assert ask(server.url, "chat").text == "é!"


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_what_a_server_broke_off_is_no_answer(form: Form) -> None:
    """A grader would take what there is of it for a wrong one."""
    answer = say("")
    answer["choices"][0] |= {"finish_reason": "abort"}
    with (
        answering(lambda body: answer) as server,
        pytest.raises(EndpointError, match="expected a whole answer, got finish_reason 'abort'"),
    ):
        ask(server.url, form)


@pytest.mark.parametrize("text", [5, ["é"], [{"type": "text"}], {"text": "é"}])
def test_what_is_no_text_is_no_answer(text: Any) -> None:
    with answering(lambda body: say(text)) as server:
        for form in ("chat", "completion"):
            with pytest.raises(EndpointError, match="expected an OpenAI answer, got"):
                ask(server.url, form)


def test_nothing_is_an_answer_of_a_chat_alone() -> None:
    """As where a server's parser took all that was said for thoughts; a completion always has a text."""
    with answering(lambda body: say(None)) as server:
        assert ask(server.url, "chat").text == ""
        with pytest.raises(EndpointError, match="expected an OpenAI answer, got"):
            ask(server.url, "completion")


def test_checkpoint_is_what_the_endpoint_says() -> None:
    async def find(url: str, key: str | None) -> str | None:
        async with Endpoint(url, model="fake", api_key=key, retries=0) as endpoint:
            return await endpoint.find_checkpoint()

    with MockEngine(Settings(listed_length=True, root="here", key="k")) as server:
        assert asyncio.run(find(server.url, "k")) == "here"
        assert asyncio.run(find(server.url, None)) is None  # it lists models to those alone who have a key
    with MockEngine() as server:
        assert asyncio.run(find(server.url, None)) is None
    with pytest.raises(EndpointError):
        asyncio.run(find("http://127.0.0.1:9", None))


@pytest.mark.parametrize("tokens", ["many", -5, 1e300, 10**30, True, None, [3]])
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_usage_and_reason_of_another_kind_are_none(form: Form, tokens: Any) -> None:
    """The client takes them as they come; a run that noted them could not read its own folder."""
    answer = say("é") | {"usage": {"completion_tokens": tokens}}
    answer["choices"][0] |= {"finish_reason": 7}
    with answering(lambda body: answer) as server:
        assert ask(server.url, form) == Answer("é", None, None, {})


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


def test_error_with_the_status_of_an_answer_is_told() -> None:
    """As some routers of requests answer when a provider of theirs has failed."""
    body: Any = {"error": {"message": "overloaded", "code": 429}}
    with answering(lambda _: body) as server:
        for form in ("chat", "completion"):
            with pytest.raises(EndpointError, match=r"expected an OpenAI answer, got TypeError of .*overloaded"):
                ask(server.url, form)


def test_page_of_a_proxy_is_told_in_one_line() -> None:
    text = "<html>\n<h1>Bad gateway</h1>\n</html>"
    response: Any = SimpleNamespace(status_code=502, text=text, headers={}, request=None)
    said = _describe(openai.InternalServerError("", response=response, body=None))
    assert said == "HTTP 502: <html> <h1>Bad gateway</h1> </html>"


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
