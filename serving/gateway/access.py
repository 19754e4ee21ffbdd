"""Who may ask: API keys by their SHA-256, compared in constant time, and how much each may have in flight."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from laguna_serve.serving.gateway import errors
from laguna_serve.serving.gateway.config import Key


@dataclass(slots=True)
class _Holder:
    key: Key
    digest: bytes
    in_flight: int = 0


class Access:
    """The configured keys; without any, everybody may ask."""

    def __init__(self) -> None:
        self._holders: list[_Holder] = []

    def configure(self, keys: Sequence[Key]) -> None:
        """Take the keys; what a key of the same name has in flight stays counted."""
        known = {holder.key.name: holder for holder in self._holders}
        holders = [known.get(key.name) or _Holder(key, b"") for key in keys]
        for holder, key in zip(holders, keys, strict=True):
            holder.key, holder.digest = key, bytes.fromhex(key.sha256)
        self._holders = holders

    @contextmanager
    def enter(self, headers: Sequence[tuple[bytes, bytes]]) -> Iterator[str | None]:
        """Hold a place under the request's key for as long as the block runs; yields the key's name.

        Raises:
            GatewayError: 401 no known key, 429 the key has as much in flight as it may.
        """
        if not self._holders:
            yield None
            return
        holder = self._find(headers)
        if holder.key.max_in_flight is not None and holder.in_flight >= holder.key.max_in_flight:
            raise errors.contended()
        holder.in_flight += 1
        try:
            yield holder.key.name
        finally:
            holder.in_flight -= 1

    def _find(self, headers: Sequence[tuple[bytes, bytes]]) -> _Holder:
        """OpenAI's clients send a bearer token, Anthropic's the header x-api-key."""
        found = None
        for name, value in headers:
            secret = value if name == b"x-api-key" else None
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                secret = value[7:].strip()
            if secret:
                digest = hashlib.sha256(secret).digest()
                for holder in self._holders:  # all of them, so that the time tells nothing
                    if hmac.compare_digest(digest, holder.digest):
                        found = holder
        if found is None:
            raise errors.unauthorized()
        return found
