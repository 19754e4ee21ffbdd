"""A stream of the Responses API that goes wrong ends in `error` and `response.failed`, as OpenAI's does.

What is raised after a stream's first event (a grammar that cannot be compiled, for one) tears the connection down in
the middle of the answer, so that clients see a lost engine and ask again; streams of chats and completions end in an
error event. bench/fuzz.py found it.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_response_streams.py::test_stock_tears_the_stream_off` fails.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from vllm.entrypoints.openai.responses import api_router
from vllm.entrypoints.serve.exception_handling import error_response

logger = logging.getLogger(__name__)
CODES = {400: "invalid_prompt"}
stock_convert = api_router._convert_stream_to_sse_events


async def convert(generator: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
    """`_convert_stream_to_sse_events`: a server-sent event per event of the stream, and two for an exception."""
    stream = _Remembering(generator)
    try:
        async for event in stock_convert(stream):
            yield event
    except Exception as error:
        logger.warning("a stream of /v1/responses ends in an error", exc_info=True)
        for text in stream.render_failure(error):
            yield text


class _Remembering:
    """A stream of events, and what its end needs to know of them."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self._events = events
        self._sequence = -1
        self._response: dict[str, Any] = {"object": "response", "output": []}

    def __aiter__(self) -> _Remembering:
        return self

    async def __anext__(self) -> Any:
        event = await anext(self._events)
        if self._sequence < 0 and (response := getattr(event, "response", None)) is not None:
            self._response = response.model_dump(mode="json", by_alias=True)
        self._sequence = getattr(event, "sequence_number", self._sequence)
        return event

    def render_failure(self, error: Exception) -> list[str]:
        """`error`, for which SDKs raise, and `response.failed`, for which agents wait; numbered like those before."""
        found = error_response.create_error_response(error).error
        about = {"code": CODES.get(found.code, "server_error"), "message": found.message}
        first = {"type": "error", **about, "param": found.param, "sequence_number": self._sequence + 1}
        failed = {**self._response, "status": "failed", "error": about}
        last = {"type": "response.failed", "response": failed, "sequence_number": self._sequence + 2}
        return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in (first, last)]


def apply() -> None:
    """Put `convert` in the place of vLLM's `_convert_stream_to_sse_events`."""
    api_router._convert_stream_to_sse_events = convert
