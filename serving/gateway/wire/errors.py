"""What a client gets when the gateway cannot give it an engine's answer: one table, in each API's own words and form.

OpenAI's form is `{"error": {"message", "type", "param", "code"}}`, Anthropic's (/v1/messages) `{"type": "error",
"error": {"type", "message"}}` with its error types by status (docs.claude.com, "Errors"), Cohere's (/cohere/)
`{"message"}`. The last events of a broken stream are in the same forms; those of /v1/responses are in sse.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

RETRY_AFTER_S = 1
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
DONE = b"data: [DONE]\n\n"


@dataclass(eq=False)
class GatewayError(Exception):
    """A request that the gateway answers with an error of its own, as OpenAI's API does.

    `status` is HTTP's; `kind`, `code` and `param` are OpenAI's type, code and param; `message` is for people and never
    has a prompt or a key. `reason` is one word for logs and metrics, another one for every constructor below.
    """

    status: int
    kind: str
    message: str
    retry_after_s: int | None = None
    code: str | None = None
    param: str | None = None
    reason: str = "other"

    def forget_origin(self) -> GatewayError:
        """Forget the frames that the error passed through; it is the same one."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer that carries the error."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found

    def body(self, path: str) -> bytes:
        """Return the answer, in the form of the API that `path` belongs to."""
        return json.dumps(self._describe(path)).encode()

    def event(self, path: str) -> bytes:
        """Return the last events of a stream that cannot go on."""
        if _is_messages(path):
            return b"event: error\ndata: " + self.body(path) + b"\n\n"
        if _is_cohere(path):
            end = {"type": "message-end", "delta": {"error": self.message, "finish_reason": "ERROR"}}
            return b"event: message-end\ndata: " + json.dumps(end).encode() + b"\n\n" + DONE
        return b"data: " + self.body(path) + b"\n\n" + DONE

    def describe(self) -> dict[str, str | None]:
        """Describe the error as the object under `error` in OpenAI's form."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def _describe(self, path: str) -> dict[str, object]:
        if _is_messages(path):
            kind = ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if _is_cohere(path):
            return {"message": self.message}
        return {"error": self.describe()}


def _is_messages(path: str) -> bool:
    return path.startswith("/v1/messages")


def _is_cohere(path: str) -> bool:
    return path.startswith("/cohere/")


def missing_key() -> GatewayError:
    message = "No API key was given. Send one in the header Authorization: Bearer KEY."
    return GatewayError(401, "invalid_request_error", message, code="missing_api_key", reason="missing_key")


def wrong_key() -> GatewayError:
    """Say that a key is not known."""
    return GatewayError(
        401, "invalid_request_error", "The API key is not valid.", code="invalid_api_key", reason="wrong_key"
    )


def bad_request(message: str, *, param: str | None = None) -> GatewayError:
    """Say that the request cannot be routed."""
    return GatewayError(400, "invalid_request_error", message, param=param, reason="bad_request")


def unknown_model(model: str) -> GatewayError:
    """Neither the configuration nor an engine knows the name."""
    name = model[:128].encode(errors="replace").decode()  # half a surrogate pair could not be logged
    message = f"The model `{name}` does not exist."
    return GatewayError(
        404, "invalid_request_error", message, code="model_not_found", param="model", reason="unknown_model"
    )


def hidden_model(model: str) -> GatewayError:
    """Say of a model that the key may not ask for what is said of one that nobody knows."""
    error = unknown_model(model)
    error.reason = "model_not_allowed"
    return error


def strange_origin() -> GatewayError:
    """Say that pages of this origin may not ask."""
    message = "This origin is not one of server.allowed_origins."
    return GatewayError(403, "invalid_request_error", message, reason="strange_origin")


def unknown_path(method: str, path: str) -> GatewayError:
    """No path that engines serve to clients."""
    message = f"There is no route {method} {path[:128]}."
    return GatewayError(404, "invalid_request_error", message, code="unknown_url", reason="unknown_path")


def unserved_path(method: str, path: str, model: str) -> GatewayError:
    """Say of a path that others have that the model's engine has none like it."""
    message = f"There is no route {method} {path[:128]} for the model `{model}`: its engine does not have it."
    return GatewayError(404, "invalid_request_error", message, code="unknown_url", reason="unserved_path")


def body_too_large(most: int) -> GatewayError:
    """Say that the body is larger than the gateway takes."""
    message = f"Request body is too large: the maximum is {most} bytes."
    return GatewayError(413, "invalid_request_error", message, code="request_too_large", reason="body_too_large")


def encoded_body(coding: str) -> GatewayError:
    """Say that a body is taken as it is, not compressed."""
    message = f"Content-Encoding {coding[:64]!r} is not supported: send the body uncompressed."
    return GatewayError(415, "invalid_request_error", message, code="unsupported_encoding", reason="encoded_body")


def transfer_coding(coding: str) -> GatewayError:
    """Say that a body is sent as it is or in chunks, and in no other transfer coding."""
    message = f"Transfer-Encoding {coding[:64]!r} is not supported: send the body as it is, or chunked alone."
    code, reason = "unsupported_encoding", "transfer_coding"
    return GatewayError(501, "invalid_request_error", message, code=code, reason=reason)


def body_too_slow() -> GatewayError:
    """Say that the body did not arrive in time."""
    message = "Request timed out: its body did not arrive in time."
    return GatewayError(408, "timeout_error", message, code="request_timeout", reason="body_too_slow")


def contended() -> GatewayError:
    """Every slot is taken and the queue is full."""
    message = "Rate limit exceeded: too many requests at once. Please try again later."
    return GatewayError(
        429, "rate_limit_error", message, RETRY_AFTER_S, code="rate_limit_exceeded", reason="queue_full"
    )


def queue_bytes_full() -> GatewayError:
    """Bodies that wait, or still arrive, fill the memory that they may have."""
    message = "Rate limit exceeded: too many bytes of requests are waiting. Please try again later."
    code, reason = "rate_limit_exceeded", "queue_bytes_full"
    return GatewayError(429, "rate_limit_error", message, RETRY_AFTER_S, code=code, reason=reason)


def key_in_flight(most: int) -> GatewayError:
    """Say that the key has as many requests in flight as it may."""
    message = f"Rate limit exceeded: this API key may have {most} requests at once. Please try again later."
    code, reason = "rate_limit_exceeded", "key_in_flight"
    return GatewayError(429, "rate_limit_error", message, RETRY_AFTER_S, code=code, reason=reason)


def out_of_descriptors() -> GatewayError:
    """Say that the gateway may open no more files, so that no engine can be reached."""
    message = "The server has run out of file descriptors. Please try again later."
    code, reason = "service_unavailable", "out_of_descriptors"
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code=code, reason=reason)


def too_often(retry_after_s: int) -> GatewayError:
    """Say that the key has used up its requests of this minute."""
    message = f"Rate limit exceeded: too many requests per minute. Please try again in {retry_after_s}s."
    return GatewayError(429, "rate_limit_error", message, retry_after_s, code="rate_limit_exceeded", reason="key_rate")


def too_many_tokens(retry_after_s: int) -> GatewayError:
    """Say that the key has used up its tokens of this minute."""
    message = f"Rate limit exceeded: too many tokens per minute. Please try again in {retry_after_s}s."
    code, reason = "rate_limit_exceeded", "key_tokens"
    return GatewayError(429, "rate_limit_error", message, retry_after_s, code=code, reason=reason)


def budget_used(retry_after_s: int) -> GatewayError:
    """Say that the key's tokens of this day do not suffice for the request, with those that are being spent."""
    message = "You exceeded your current quota: this API key's tokens for today. It begins anew at midnight UTC."
    code, reason = "insufficient_quota", "key_budget"
    return GatewayError(429, "insufficient_quota", message, retry_after_s, code=code, reason=reason)


def queue_timeout() -> GatewayError:
    """Say that a request waited too long for a slot."""
    message = "Request timed out while it was waiting in the queue. Please try again later."
    return GatewayError(408, "timeout_error", message, code="request_timeout", reason="queue_timeout")


def not_ready() -> GatewayError:
    """No engine of the model is healthy."""
    message = "The model is currently unavailable: none of its engines is healthy. Please try again later."
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code="service_unavailable", reason="no_engine")


def bad_weight_policy(given: str) -> GatewayError:
    """Say which forms X-Weight-Policy has."""
    forms = "any, latest-only, min-version=N or max-staleness=K"
    message = f"The X-Weight-Policy header must be {forms}, got {given[:64]!r}."
    return GatewayError(400, "invalid_request_error", message, reason="bad_weight_policy")


def no_such_weights(policy: str, latest: str) -> GatewayError:
    """Say that no engine has weights that may answer the request."""
    message = f"No engine has weights for X-Weight-Policy {policy}: the newest is {latest}. Please try again later."
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code="weights_not_available", reason="weights")


def weights_unknown(policy: str) -> GatewayError:
    """Say that an engine did not tell its weights' version while the request waited for it."""
    message = (
        f"An engine has not reported its weight version, needed for X-Weight-Policy {policy}. Please try again later."
    )
    code, reason = "weights_not_available", "weights_unknown"
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code=code, reason=reason)


def not_loaded() -> GatewayError:
    """Say that a request that is no work for a model does not load it."""
    message = "The model is not loaded, and this request does not load it: one for an answer does."
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code="service_unavailable", reason="not_loaded")


def cannot_load(cause: str, retry_after_s: int) -> GatewayError:
    """Say why the model's engine could not be started."""
    message = f"The model could not be loaded: {cause}. It is tried again in {retry_after_s}s at the earliest."
    return GatewayError(503, "server_error", message, retry_after_s, code="model_not_loaded", reason="cannot_load")


def load_timeout(state: str, retry_after_s: int) -> GatewayError:
    """Say that the model was not ready in time, and where it was then."""
    doing = "it waits for room" if state in ("unloaded", "asleep", "unloading") else f"it is {state}"
    message = f"The model was not loaded in time: {doing}. Please try again later."
    return GatewayError(503, "server_error", message, retry_after_s, code="model_not_loaded", reason="load_timeout")


def draining() -> GatewayError:
    """Say that the gateway is about to stop."""
    message = "The server is shutting down. Please try again later."
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code="service_unavailable", reason="draining")


def stopped() -> GatewayError:
    """Say that the gateway stops before the answer is complete."""
    message = "The server shut down before the response was complete."
    return GatewayError(503, "server_error", message, code="server_error", reason="stopped")


def failed() -> GatewayError:
    """Admit a defect of the gateway; its log has the traceback."""
    message = "The server had an error while processing your request. Please try again later."
    return GatewayError(500, "server_error", message, code="server_error", reason="failed")


def engine_lost() -> GatewayError:
    """Say that the engine's connection broke."""
    message = "The connection to the engine was lost before the response was complete."
    return GatewayError(502, "server_error", message, code="server_error", reason="engine_lost")


def engine_unreachable() -> GatewayError:
    """Say that no engine could be connected to, so that none has seen the request."""
    error = engine_lost()
    error.reason = "engine_unreachable"
    return error


def engine_silent() -> GatewayError:
    """Say that the engine sent nothing for too long."""
    message = "The engine sent nothing for too long."
    return GatewayError(504, "server_error", message, code="server_error", reason="engine_silent")
