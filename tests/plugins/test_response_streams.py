"""Streams of the Responses API that go wrong on their way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from laguna_serve.plugins.repairs.front_end import response_stream_errors

pytestmark = pytest.mark.vllm


async def break_off(events: int, error: Exception) -> AsyncIterator[Any]:
    """A stream's first events as vLLM makes them, then an exception."""
    from vllm.entrypoints.openai.responses.protocol import (
        ResponseCreatedEvent,
        ResponseInProgressEvent,
        ResponsesRequest,
        ResponsesResponse,
    )
    from vllm.sampling_params import SamplingParams

    response = ResponsesResponse.from_request(
        ResponsesRequest(model="m", input="x"),
        SamplingParams(max_tokens=8),
        model_name="m",
        created_time=0,
        output=[],
        status="in_progress",
    ).model_dump(mode="json", by_alias=True)
    kinds = (ResponseCreatedEvent, "response.created"), (ResponseInProgressEvent, "response.in_progress")
    for number, (kind, name) in enumerate(kinds[:events]):
        yield kind(type=name, sequence_number=number, response=response)
    raise error


def collect(convert: Callable[..., AsyncIterator[str]], events: int, error: Exception) -> list[dict[str, Any]]:
    async def run() -> list[str]:
        return [text async for text in convert(break_off(events, error))]

    texts = asyncio.run(run())
    found = [json.loads(text.split("\ndata: ")[1]) for text in texts]
    assert [text.split("\n")[0] for text in texts] == [f"event: {event['type']}" for event in found]
    return found


def test_stock_tears_the_stream_off() -> None:
    """When this fails, vLLM ends the stream itself: retire plugins/repairs/front_end/response_stream_errors.py."""
    with pytest.raises(ValueError, match="no such grammar"):
        collect(response_stream_errors.stock_convert, 2, ValueError("no such grammar"))


def test_stream_ends_in_error_and_response_failed() -> None:
    from vllm.exceptions import VLLMValidationError

    events = collect(response_stream_errors.convert, 2, VLLMValidationError("no such grammar"))
    assert [event["type"] for event in events[2:]] == ["error", "response.failed"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]
    assert events[2]["code"] == "invalid_prompt"
    assert events[2]["message"].startswith("no such grammar")
    failed = events[3]["response"]
    assert (failed["id"], failed["status"]) == (events[0]["response"]["id"], "failed")
    assert failed["error"]["code"] == "invalid_prompt"


def test_engines_own_failure_is_the_servers() -> None:
    events = collect(response_stream_errors.convert, 1, RuntimeError("boom"))
    assert [event["type"] for event in events] == ["response.created", "error", "response.failed"]
    assert events[1]["code"] == "server_error"


def test_stream_that_never_began_has_an_end_too() -> None:
    events = collect(response_stream_errors.convert, 0, RuntimeError("boom"))
    assert [event["type"] for event in events] == ["error", "response.failed"]
    assert events[1]["response"]["status"] == "failed"
