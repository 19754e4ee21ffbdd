"""Errors as OpenAI's clients read them, in the form that vLLM gives them."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
RETRY_AFTER_S = "1"


class ApiError(Exception):
    """A request that is not served, with its status; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def describe(self) -> dict[str, Any]:
        """Describe it as a JSON object."""
        kind = TYPES.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def respond(self) -> JSONResponse:
        """Answer the request with it."""
        headers = {"Retry-After": RETRY_AFTER_S} if self.status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return JSONResponse(self.describe(), self.status, headers)

    def format_event(self) -> str:
        """Format it as an event of a stream that has begun."""
        return f"data: {json.dumps(self.describe())}\n\n"


def describe_invalid(error: RequestValidationError) -> ApiError:
    """Describe the first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON, got something else: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or "body"
    return ApiError(400, f"{field}: {first['msg']}", place[0] if place else None)
