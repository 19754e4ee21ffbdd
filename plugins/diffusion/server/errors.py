"""Errors as OpenAI's clients read them, in the form that vLLM gives them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from laguna_serve.plugins.diffusion.server.writing.forms import ErrorAnswer, ErrorForm

TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
RETRY_AFTER_S = "1"
# Of pydantic's messages.
PREFIX = "Input should be "


class ApiError(Exception):
    """A request that is not served, with its status; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def write(self) -> str:
        """Write it as a JSON object."""
        kind = TYPES.get(self.status, "InternalServerError")
        form = ErrorForm(message=self.message, type=kind, param=self.param, code=self.status)
        return ErrorAnswer(error=form).model_dump_json()

    def respond(self) -> Response:
        """Answer the request with it."""
        headers = {"Retry-After": RETRY_AFTER_S} if self.status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return Response(self.write(), self.status, headers, media_type="application/json")

    def write_event(self) -> str:
        """Write it as an event of a stream that has begun."""
        return f"data: {self.write()}\n\n"


def describe_invalid(error: RequestValidationError) -> ApiError:
    """Describe what is wrong with a body: of a field of several kinds, all that fail where one got furthest."""
    found = error.errors()
    first = max(found, key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON, got something else: {first['ctx']['error']}")
    place = _find_place(first)
    said = dict.fromkeys(each["msg"] for each in found if _find_place(each) == place)
    one, *others = said
    message = " or ".join([one, *(each.removeprefix(PREFIX) for each in others)])
    return ApiError(400, f"{'.'.join(place) or 'body'}: {message}", place[0] if place else None)


def _find_place(error: Any) -> list[str]:
    """Find the field, without the names that pydantic gives to the kinds that it may be."""
    return [str(part) for part in error["loc"] if part not in ("body", "str") and "[" not in str(part)]
