"""What belongs together, and goes to one engine while that has room."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.wire.headers import Head

SESSION_HEADER = b"x-session-id"
PREFIX_BYTES = 512


def find_affinity(pool: Pool, head: Head, body: bytes, holder: Holder | None) -> bytes | None:
    """Find it by the header X-Session-ID, else by the key, or by how the body begins; None: nothing does."""
    kind = pool.model.affinity
    if kind == "session":
        session = head.named.get(SESSION_HEADER)
        return session if session is not None or holder is None else holder.name.encode()
    if kind == "prefix" and body:
        return body[:PREFIX_BYTES]
    return None
