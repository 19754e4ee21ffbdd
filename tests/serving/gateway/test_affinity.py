"""What belongs together, by which of a request's names, and how much of its body counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from laguna_serve.serving.gateway.relay.affinity import find_affinity


@pytest.mark.parametrize(
    ("kind", "session", "key", "body", "found"),
    [
        ("session", b"s", "alice", b"x", b"s"),
        ("session", b"s", None, b"x", b"s"),
        ("session", None, "alice", b"x", b"alice"),
        ("session", None, None, b"x", None),
        ("prefix", b"s", "alice", b"x" * 600, b"x" * 512),
        ("prefix", None, None, b"", None),
        ("none", b"s", "alice", b"x", None),
    ],
)
def test_what_belongs_together(
    kind: str, session: bytes | None, key: str | None, body: bytes, found: bytes | None
) -> None:
    pool: Any = SimpleNamespace(model=SimpleNamespace(affinity=kind))
    head: Any = SimpleNamespace(named={} if session is None else {b"x-session-id": session})
    holder: Any = None if key is None else SimpleNamespace(name=key)
    assert find_affinity(pool, head, body, holder) == found
