"""What a client gets that has not come as far as a request: an error in its API's form, and the connection's end."""

from __future__ import annotations

from http import HTTPStatus

from laguna_serve.serving.gateway.wire.errors import RETRY_AFTER_S, GatewayError, bad_request


def not_http() -> GatewayError:
    """Say that what came is no request, or that its body is not framed as one."""
    return bad_request("Invalid HTTP request received.")


def head_too_large(most: int) -> GatewayError:
    """Say that a request's head is larger than the gateway takes."""
    message = f"Request headers are too large: the maximum is {most} bytes."
    return GatewayError(431, "invalid_request_error", message, code="headers_too_large", reason="head_too_large")


def head_too_slow() -> GatewayError:
    """Say that the head did not arrive in time."""
    message = "Request timed out: its headers did not arrive in time."
    return GatewayError(408, "timeout_error", message, code="request_timeout", reason="head_too_slow")


def too_many_connections() -> GatewayError:
    """Say that there is no room for another connection."""
    message = "The server has too many connections. Please try again later."
    code, reason = "service_unavailable", "too_many_connections"
    return GatewayError(503, "server_error", message, RETRY_AFTER_S, code=code, reason=reason)


def render(error: GatewayError, target: bytes = b"") -> bytes:
    """Render the whole answer, in the form of the API that `target` belongs to, as far as one is known."""
    body = error.body(target.decode("latin-1"))
    status = HTTPStatus(error.status)
    headers = [*error.headers(), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, status.phrase.encode(), lines, body)
