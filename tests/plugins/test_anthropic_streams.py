"""Streams of the Messages API, made of chat's, that go wrong on their way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from laguna_serve.plugins.repairs.front_end import anthropic_streams
from laguna_serve.plugins.repairs.front_end.anthropic_streams import Convert

pytestmark = pytest.mark.vllm
ERROR = {"error": {"message": "no such grammar", "type": "BadRequestError", "param": None, "code": 400}}
FIRST = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
FIRST |= {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": {"prompt_tokens": 3}}


@pytest.fixture
def stock() -> Convert:
    """vLLM's own, also where the plugin has been loaded."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    found: Any = AnthropicServingMessages.message_stream_converter
    if not getattr(found, "ends_in_errors", False):
        return found  # type: ignore[no-any-return]
    return found.__closure__[found.__code__.co_freevars.index("stock")].cell_contents  # type: ignore[no-any-return]


def collect(convert: Convert, *chunks: dict[str, Any]) -> list[dict[str, Any]]:
    async def chat() -> AsyncIterator[str]:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    async def run() -> list[str]:
        return [text async for text in convert(None, chat())]

    return [json.loads(text.split("data: ")[1]) for text in asyncio.run(run())]


def test_stock_reads_an_error_as_a_piece_of_the_answer(stock: Convert) -> None:
    """When this fails, vLLM passes the error on: retire plugins/repairs/front_end/anthropic_streams.py."""
    error = next(event for event in collect(stock, ERROR) if event["type"] == "error")
    assert "validation error" in error["error"]["message"]


@pytest.mark.parametrize("before", [(), (FIRST,)], ids=["at once", "after the start"])
def test_stream_ends_in_the_error(stock: Convert, before: tuple[dict[str, Any], ...]) -> None:
    events = collect(anthropic_streams.wrap(stock), *before, ERROR)
    wanted = {"type": "error", "error": {"type": "invalid_request_error", "message": "no such grammar"}}
    assert events[-1] == wanted
    assert [event["type"] for event in events].count("error") == 1
    assert events[0]["type"] == ("message_start" if before else "error")


def test_vllm_that_hands_on_objects_is_left_as_it_is(stock: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.33 does, whose every stream would end in an error of ours."""
    from vllm.entrypoints.anthropic import serving

    monkeypatch.setattr(serving.AnthropicServingMessages, "message_stream_converter", stock)
    monkeypatch.setattr(serving, anthropic_streams.OBJECTS, Exception, raising=False)
    anthropic_streams.apply()
    assert serving.AnthropicServingMessages.message_stream_converter is stock
    monkeypatch.delattr(serving, anthropic_streams.OBJECTS)
    anthropic_streams.apply()
    assert serving.AnthropicServingMessages.message_stream_converter is not stock
