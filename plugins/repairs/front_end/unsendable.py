"""Requests that cannot be sent to the engine's process are the client's mistake: 400 instead of 500.

A lone surrogate is JSON ("\\ud800") but no text, and 2**64 an integer but none of 64 bits: vLLM's checks let both pass,
for instance in `stop`, `cache_salt` or `priority`, and the message to the engine's process cannot be written.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_request_limits.py::test_stock_blames_itself_for_a_surrogate` fails.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

stock_add = AsyncLLM._add_request


async def add_request(self: AsyncLLM, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
    """`AsyncLLM._add_request`; what could not be sent is forgotten again."""
    try:
        await stock_add(self, request, *args, **kwargs)
    except (UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        self.output_processor.abort_requests([request.request_id], internal=True)
        raise VLLMValidationError(f"The request holds a text or a number that cannot be processed: {error}") from error


def apply() -> None:
    """Put `add_request` in the place of vLLM's `AsyncLLM._add_request`."""
    AsyncLLM._add_request = add_request
