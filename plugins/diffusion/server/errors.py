"""Errors as OpenAI's clients read them, in the form that vLLM gives them."""

from __future__ import annotations

from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from laguna_serve.plugins.diffusion.server.writing.forms import ErrorAnswer, ErrorForm

TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
RETRY_AFTER_S = "1"


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
    """Describe the first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON, got something else: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or "body"
    return ApiError(400, f"{field}: {first['msg']}", place[0] if place else None)
