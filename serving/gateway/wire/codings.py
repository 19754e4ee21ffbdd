"""Codings of a request's body: it is taken as it is, in one piece or in chunks. What is coded otherwise is refused."""

from __future__ import annotations

from collections.abc import Mapping

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import Headers

CONTENT, TRANSFER = b"content-encoding", b"transfer-encoding"
CHUNKED = [b"chunked"]


def check_codings(headers: Headers, named: Mapping[bytes, bytes]) -> None:
    """Check that nothing would have to be undone to a body but its chunks; `named` has the first of every name.

    Where `chunked` is not the last transfer coding nobody knows where the body ends, which is the parser's to refuse.

    Raises:
        GatewayError: 415 it is compressed, 501 it is sent in another transfer coding before `chunked`.
    """
    if CONTENT in named and (coding := named[CONTENT].strip().lower()) not in (b"", b"identity"):
        raise errors.encoded_body(coding.decode("latin-1"))
    if TRANSFER not in named:
        return
    codings = [part.strip().lower() for name, value in headers if name == TRANSFER for part in value.split(b",")]
    codings = [coding for coding in codings if coding]
    if codings[-1:] == CHUNKED and codings != CHUNKED:
        raise errors.transfer_coding(codings[0].decode("latin-1"))
