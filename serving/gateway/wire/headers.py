"""What of a request's and an answer's head passes. Pure functions on bytes."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from laguna_serve.serving.gateway.wire.redirects import POINTING, Site, localize

Headers = Sequence[tuple[bytes, bytes]]

# Of one connection, not of the message: RFC 9110, section 7.6.1. Accept-Encoding goes on, so that bytes stay bytes.
PROXY_HEADERS = (b"proxy-authenticate", b"proxy-authorization", b"proxy-connection")
HOP_BY_HOP = frozenset(
    (
        *PROXY_HEADERS,
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
REQUEST_ID, UPSTREAM = b"x-request-id", b"x-upstream"
WEIGHTS, DRAFT = b"x-weight-version", b"x-draft-version"
FALLBACK, RATE_LIMIT = b"x-fallback-from", b"x-ratelimit-"
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", REQUEST_ID, b"x-forwarded-for", b"forwarded"}
OURS = HOP_BY_HOP | {REQUEST_ID, UPSTREAM, WEIGHTS, DRAFT, FALLBACK}
KEYS = frozenset((b"authorization", b"x-api-key"))
CONTEXT = frozenset((b"traceparent", b"tracestate"))
CODINGS = frozenset((b"accept-encoding",))
NONE = frozenset[bytes]()
PLAIN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class Head(NamedTuple):
    """The head of a request.

    `target` is path and query as the client wrote them, `path` the decoded path; `named` has the first header of every
    name, `peer` is the address at the other end of the connection.
    """

    method: str
    path: str
    target: bytes
    headers: Headers
    named: Mapping[bytes, bytes]
    request_id: bytes
    peer: str = ""


def read_head(method: str, path: str, raw_path: bytes, query: bytes, headers: Headers, peer: str = "") -> Head:
    """From what an HTTP server knows. The request's id is the client's, where that is a plain word, or a new one."""
    named = dict(reversed(headers))
    given = named.get(REQUEST_ID)
    request_id = given if given is not None and PLAIN_ID.fullmatch(given) else b"%032x" % random.getrandbits(128)
    return Head(method, path, raw_path + b"?" + query if query else raw_path, headers, named, request_id, peer)


def read_length(named: Mapping[bytes, bytes]) -> int | None:
    """Read how long the body is, as far as its head says; 0 where it does not, None where that is no number.

    The parser takes no number beyond 64 bits, and zeros without end in front of one, which Python's `int` does not.
    """
    given = named.get(b"content-length", b"0").strip(b" \t")
    return int(given.lstrip(b"0") or b"0") if given.isdigit() else None


@functools.cache
def find_dropped(keys_are_ours: bool, traced: bool, plain: bool) -> frozenset[bytes]:
    """Find the headers of a request that no engine gets.

    Args:
        keys_are_ours: a key was for the gateway.
        traced: the trace has another context for the engine.
        plain: the answer must not be compressed, as it will be read.
    """
    more = ((keys_are_ours, KEYS), (traced, CONTEXT), (plain, CODINGS))
    return NOT_FORWARDED.union(*(names for applies, names in more if applies))


def render_request(
    head: Head,
    body: bytes,
    lines: bytes,
    prefix: bytes = b"",
    forwarded_for: bytes = b"",
    dropped: frozenset[bytes] = NOT_FORWARDED,
) -> bytes:
    """Render the request for an engine, whose own header `lines` (host, credential, trace context) come first.

    Headers that are `dropped`, or that the client's Connection names, stay behind.
    """
    if b"connection" in head.named:
        dropped = dropped | read_connection(head.headers)
    parts = [head.method.encode(), b" ", prefix, head.target, b" HTTP/1.1\r\n", lines]
    for name, value in head.headers:
        if name not in dropped:
            parts += (name, b": ", value, b"\r\n")
    if forwarded_for:
        parts += (b"x-forwarded-for: ", forwarded_for, b"\r\n")
    if body or head.method in ("POST", "PUT", "PATCH"):
        parts.append(b"content-length: %d\r\n" % len(body))
    parts += (b"x-request-id: ", head.request_id, b"\r\n\r\n", body)
    return b"".join(parts)


def read_connection(headers: Headers) -> frozenset[bytes]:
    """Read the headers that Connection names, in lower case: of this connection only. Names are in lower case."""
    found = NONE
    for name, value in headers:
        if name == b"connection":
            found |= {part.strip().lower() for part in value.split(b",")}
    return found


def pass_headers(headers: Headers, site: Site, *, limited: bool = False) -> list[tuple[bytes, bytes]]:
    """Pass an engine's answer's headers on to the client, names in lower case.

    None of its connection's own is among them, none that leads past the gateway, and where the client's key has limits
    of ours (`limited`) none that tells of a provider's.
    """
    named = read_connection(headers)
    dropped = OURS | named if named else OURS
    return [
        (name, localize(name, value, site) if name in POINTING else value)
        for name, value in headers
        if name not in dropped and not (limited and name.startswith(RATE_LIMIT))
    ]
