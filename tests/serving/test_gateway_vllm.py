"""Through the gateway and straight to a real engine: the same bodies, and the official clients work."""

from __future__ import annotations

import json
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest
from gateway_fakes import Gateway, Reply, Upstream, gateway, make_request, read_reply

from laguna_serve.serving.engine import Engine

pytestmark = pytest.mark.vllm

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Complete:\ndef add(a, b):"}], "temperature": 0}
TEXT = {"model": "m", "prompt": "def add(a, b):\n    ", "temperature": 0, "max_tokens": 24}
LONG = {"max_tokens": 24, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CASES: list[tuple[str, dict[str, Any] | bytes | None]] = [
    ("/v1/models", None),
    ("/version", None),
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}),
    ("/v1/completions", {**TEXT, "n": 3, "logprobs": 3, "prompt_logprobs": 1, "echo": True}),
    ("/v1/completions", {**TEXT, "stream": True, "logprobs": 2, "unknown_vendor_field": {"é": 1}}),
    ("/v1/completions", {**TEXT, "prompt": "", "max_tokens": -1}),
    ("/v1/completions", {**TEXT, "structured_outputs": {"json": SCHEMA}}),
    ("/v1/chat/completions", {**CHAT, **LONG}),
    ("/v1/chat/completions", {**CHAT, **LONG, "stream": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", b'{"model": "m", "messages": [{'),
    ("/v1/messages", {**CHAT, **LONG}),
    ("/v1/messages", {**CHAT, **LONG, "stream": True}),
    ("/v1/responses", {"model": "m", "input": "def f(", "temperature": 0, "max_output_tokens": 8, "store": False}),
    ("/tokenize", {"model": "m", "prompt": "def café(): pass"}),
    ("/detokenize", {"model": "m", "tokens": [10, 20, 30]}),
    ("/v1/nowhere", {"model": "m"}),
]
# What differs from one request to the next: ids, times, and what is derived from them.
CHANGING = re.compile(
    rb'"((?:[a-z_]*id|request_id|item_id|response_id))":\s*"[^"]*"|"(created|created_at|completed_at)":\s*[0-9.]+'
)


@pytest.fixture(scope="module")
def front(fp32_engine: Engine) -> Any:
    with gateway(Upstream(url=fp32_engine.base_url), model={"name": fp32_engine.model_name}) as found:
        yield found


def ask(port: int, path: str, body: bytes | None) -> Reply:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(make_request(path, body, "content-type: application/json\r\n"))
        return read_reply(connection)


@pytest.mark.parametrize(("path", "body"), CASES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(CASES)])
def test_body_is_the_engines(
    front: Gateway, fp32_engine: Engine, path: str, body: dict[str, Any] | bytes | None
) -> None:
    if isinstance(body, dict):
        body = json.dumps({**body, "model": fp32_engine.model_name}).encode()
    direct = ask(urlsplit(fp32_engine.base_url).port or 0, path, body)
    through = ask(front.port, path, body)
    assert through.status == direct.status
    assert through.header("content-type") == direct.header("content-type")
    assert CHANGING.sub(b"", through.body) == CHANGING.sub(b"", direct.body)
    front.wait_idle()


def test_official_clients_work(front: Gateway, fp32_engine: Engine) -> None:
    model = fp32_engine.model_name
    messages: Any = [{"role": "user", "content": "def add(a, b):"}]
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
        stream = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=12, stream=True
        )
        parts = [event.choices[0].delta.content or "" for event in stream]
        assert "".join(parts) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="other", messages=messages)
    with anthropic.Anthropic(base_url=front.url, api_key="none") as other:
        message = other.messages.create(model=model, max_tokens=12, messages=messages)
        assert message.role == "assistant"
    front.wait_idle()
