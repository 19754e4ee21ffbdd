"""What a client is told when the gateway cannot give it an engine's answer: one table, in each API's own form."""

from __future__ import annotations

import json
from dataclasses import dataclass

RETRY_AFTER_S = 1


@dataclass(eq=False)
class GatewayError(Exception):
    """`status` is HTTP's, `kind` the error's type in OpenAI's spelling, `message` for people; never prompt or key."""

    status: int
    kind: str
    message: str
    retry_after_s: int | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found

    def body(self, path: str) -> bytes:
        """The answer, as OpenAI's API has it, or Anthropic's under /v1/messages."""
        return json.dumps(self._describe(path)).encode()

    def event(self, path: str) -> bytes:
        """The last events of a stream that cannot go on."""
        data = json.dumps(self._describe(path)).encode()
        if _is_messages(path):
            return b"event: error\ndata: " + data + b"\n\n"
        return b"data: " + data + b"\n\ndata: [DONE]\n\n"

    def _describe(self, path: str) -> dict[str, object]:
        if _is_messages(path):
            return {"type": "error", "error": {"type": "api_error", "message": self.message}}
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        return {"error": error}


def _is_messages(path: str) -> bool:
    return path.startswith("/v1/messages")


def unauthorized() -> GatewayError:
    """No key, or one that is not known."""
    return GatewayError(401, "authentication_error", "expected a known API key as a bearer token, got none")


def bad_request(message: str) -> GatewayError:
    """The request cannot be routed."""
    return GatewayError(400, "invalid_request_error", message)


def unknown_model(model: str) -> GatewayError:
    """No such model here."""
    return GatewayError(404, "not_found_error", f"The model `{model}` does not exist.")


def unknown_path() -> GatewayError:
    """No path that engines serve to clients."""
    return GatewayError(404, "not_found_error", "path: expected one that engines serve to clients")


def body_too_large(most: int) -> GatewayError:
    """The body is larger than the gateway takes."""
    return GatewayError(413, "invalid_request_error", f"body: expected at most {most} bytes, got more")


def body_too_slow() -> GatewayError:
    """The body did not arrive in time."""
    return GatewayError(408, "timeout_error", "body: expected it within the time limit, got a part")


def contended() -> GatewayError:
    """Every slot is taken and the queue is full, or the key's share is used up."""
    return GatewayError(429, "rate_limit_error", "expected a free slot, got a full queue; try again", RETRY_AFTER_S)


def too_often(retry_after_s: int) -> GatewayError:
    """The key has used up its requests of this minute."""
    return GatewayError(429, "rate_limit_error", "expected fewer requests of this key, got too many", retry_after_s)


def queue_timeout() -> GatewayError:
    """It waited too long for a slot."""
    return GatewayError(408, "timeout_error", "expected a slot within the queue's deadline, got none; try again")


def not_ready() -> GatewayError:
    """No engine of the model is healthy."""
    return GatewayError(503, "service_unavailable_error", "expected a healthy engine, got none", RETRY_AFTER_S)


def draining() -> GatewayError:
    """The gateway is about to stop."""
    return GatewayError(503, "service_unavailable_error", "the gateway is stopping", RETRY_AFTER_S)


def stopped() -> GatewayError:
    """The gateway stops before the answer is complete."""
    return GatewayError(503, "service_unavailable_error", "the gateway stopped before the answer was complete")


def failed() -> GatewayError:
    """A defect of the gateway; its log has the traceback."""
    return GatewayError(500, "api_error", "the gateway failed")


def engine_lost() -> GatewayError:
    """The engine's connection broke."""
    return GatewayError(502, "api_error", "the engine was lost before its answer was complete")


def engine_silent() -> GatewayError:
    """The engine said nothing for too long."""
    return GatewayError(504, "timeout_error", "the engine said nothing for too long")
