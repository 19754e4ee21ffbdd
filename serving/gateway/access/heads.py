"""What the heads of all answers have, an engine's and the gateway's own."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.wire.headers import FALLBACK, REQUEST_ID, Headers


def list_headers(request_id: bytes, key: Holder | None, fallback_from: str | None) -> Headers:
    """List what the key's limits have left, a fallback, and the request's id."""
    found = [*key.render_limits()] if key is not None and key.limited else []
    if fallback_from is not None:
        found.append((FALLBACK, fallback_from.encode()))
    found.append((REQUEST_ID, request_id))
    return found
