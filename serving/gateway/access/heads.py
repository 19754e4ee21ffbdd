"""What the heads of all answers have, an engine's and the gateway's own."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.wire.headers import FALLBACK, RATE_LIMIT, REQUEST_ID, Headers


def add_headers(
    found: list[tuple[bytes, bytes]], request_id: bytes, key: Holder | None, fallback_from: str | None
) -> Headers:
    """Add the request's id, what the key's limits have left instead of what a provider's have, and a fallback."""
    if key is not None and key.limited:
        found = [header for header in found if not header[0].startswith(RATE_LIMIT)]
        found += key.render_limits()
    if fallback_from is not None:
        found.append((FALLBACK, fallback_from.encode()))
    found.append((REQUEST_ID, request_id))
    return found
