"""A stream of the Messages API that goes wrong ends in the error itself.

vLLM makes these streams out of chat's, and reads a chat's error event as one more piece of the answer: clients get the
words of the failed validation ("2 validation errors for ChatCompletionStreamResponse") as an `internal_error`, whoever
was to blame. Here the stream ends in an error event of Anthropic's form with the chat's message. bench/fuzz.py found
it.

Checked against vLLM 0.32.0; from 0.33 on vLLM ends these streams so itself, and is left as it is. It can go when
`tests/plugins/test_anthropic_streams.py::test_stock_reads_an_error_as_a_piece_of_the_answer` fails.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from laguna_serve.plugins.repairs.front_end.anthropic_errors import translate

DATA = "data: "
# A name of vLLM 0.33's module, in which chat hands on its events, and its errors, as objects.
OBJECTS = "_StreamError"
Convert = Callable[[Any, AsyncIterator[str]], AsyncIterator[str]]


def read_error(event: str) -> dict[str, Any] | None:
    """Anthropic's error for a chat stream's error event; None for any other event."""
    if not event.startswith(DATA + '{"error"'):
        return None
    body = event.removeprefix(DATA).strip()
    code = json.loads(body)["error"].get("code")
    return translate(body.encode(), code if isinstance(code, int) else 500)


def wrap(stock: Convert) -> Convert:
    """`AnthropicServingMessages.message_stream_converter`, which never sees an error event."""

    async def convert(self: Any, generator: AsyncIterator[str]) -> AsyncIterator[str]:
        errors: list[dict[str, Any]] = []

        async def pass_answer() -> AsyncIterator[str]:
            async for event in generator:
                if (error := read_error(event)) is not None:
                    errors.append(error)
                    return
                yield event

        async for event in stock(self, pass_answer()):
            yield event
        for error in errors:
            yield f"event: error\ndata: {json.dumps(error)}\n\n"

    convert.ends_in_errors = True  # type: ignore[attr-defined]
    return convert


def apply() -> None:
    """Replace vLLM's method where it reads chat's events as text; calling it again changes nothing."""
    from vllm.entrypoints.anthropic import serving

    if hasattr(serving, OBJECTS):
        return
    stock = serving.AnthropicServingMessages.message_stream_converter
    if not getattr(stock, "ends_in_errors", False):
        serving.AnthropicServingMessages.message_stream_converter = wrap(stock)
