"""Requests of the Responses API that spell out a default as null."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from laguna_serve.plugins.repairs.front_end import response_nulls

pytestmark = pytest.mark.vllm
FIELDS = ("background", "truncation")


def respond(from_request: Callable[..., Any], **fields: Any) -> Any:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
    from vllm.sampling_params import SamplingParams

    request = ResponsesRequest(model="m", input="x", **fields)
    sampling = SamplingParams(max_tokens=8)
    return from_request(
        ResponsesResponse, request, sampling, model_name="m", created_time=0, output=[], status="completed"
    )


@pytest.mark.parametrize("field", FIELDS)
def test_stock_cannot_repeat_a_null(field: str) -> None:
    """When this fails, vLLM reads a null as the default: retire plugins/repairs/front_end/response_nulls.py."""
    with pytest.raises(ValidationError, match=field):
        respond(response_nulls.stock_from_request, **{field: None})


@pytest.mark.parametrize("field", FIELDS)
def test_null_is_the_default(field: str) -> None:
    plain = respond(response_nulls.from_request)
    assert getattr(respond(response_nulls.from_request, **{field: None}), field) == getattr(plain, field)


def test_values_stay() -> None:
    assert respond(response_nulls.from_request, truncation="auto").truncation == "auto"
