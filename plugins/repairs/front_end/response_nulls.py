"""`null` in a request of the Responses API means the default, also where the answer repeats the field.

`background` and `truncation` may be null in a request, and vLLM copies them into a response that cannot hold a null:
the answer is a 500, and a stream, whose head has been sent by then, is cut off. bench/fuzz.py found it.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_response_nulls.py::test_stock_cannot_repeat_a_null` fails.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

FIELDS = ("background", "truncation")
stock_from_request = ResponsesResponse.from_request.__func__


def from_request(cls: type[ResponsesResponse], request: ResponsesRequest, *args: Any, **kwargs: Any) -> Any:
    """`ResponsesResponse.from_request` of a request whose nulls have become defaults."""
    for name in FIELDS:
        if getattr(request, name) is None:
            setattr(request, name, ResponsesRequest.model_fields[name].default)
    return stock_from_request(cls, request, *args, **kwargs)


def apply() -> None:
    """Put `from_request` in the place of vLLM's `ResponsesResponse.from_request`."""
    ResponsesResponse.from_request = classmethod(from_request)
