"""Who may ask: API keys, and how much each may have in flight and ask for in a minute.

Keys are kept by their SHA-256 and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from laguna_serve.serving.gateway.config.tables import Key
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError

ROUNDING = 1e-6


@dataclass(slots=True, eq=False)
class Holder:
    """A key and what is left of its limits; `tokens` fill up again through the minute (a token bucket).

    `refused` counts the requests over its limits.
    """

    key: Key
    digest: bytes = field(default=b"", repr=False)
    in_flight: int = 0
    refused: int = 0
    tokens: float = 0.0
    filled_s: float = 0.0

    @property
    def name(self) -> str:
        return self.key.name


class Access:
    """The configured keys; without any, everybody may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._holders: list[Holder] = []
        # Keys that have been found, by a keyed hash, whose lookup tells by its time as little as a constant-time
        # comparison: OpenSSL's SHA-256 alone takes 30 µs of a request that comes after a pause.
        self._found: dict[bytes, Holder] = {}
        self._salt = os.urandom(16)
        self._clock = clock

    @property
    def enabled(self) -> bool:
        """Whether there are keys, of which a request needs one."""
        return bool(self._holders)

    @property
    def holders(self) -> Sequence[Holder]:
        """The keys and their load."""
        return self._holders

    def configure(self, keys: Sequence[Key]) -> None:
        """Take the keys; what a key of the same name has in flight, and has used of its minute, stays counted."""
        known = {holder.key.name: holder for holder in self._holders}
        now = self._clock()
        holders = [
            known.get(key.name) or Holder(key, tokens=key.requests_per_minute or 0, filled_s=now) for key in keys
        ]
        for holder, key in zip(holders, keys, strict=True):
            if holder.key.requests_per_minute != key.requests_per_minute:
                holder.tokens, holder.filled_s = key.requests_per_minute or 0, now
            holder.key, holder.digest = key, bytes.fromhex(key.sha256)
        self._holders = holders
        self._found.clear()

    def enter(self, named: Mapping[bytes, bytes]) -> Holder | None:
        """Take a place under the key in the request's headers; `leave` gives it back. None where no keys are set.

        Raises:
            GatewayError: 401 no known key, 429 the key has as much in flight, or has asked as often, as it may.
        """
        if not self._holders:
            return None
        holder = self._find(named)
        key = holder.key
        if key.max_in_flight is not None and holder.in_flight >= key.max_in_flight:
            raise self._refuse(holder, errors.key_in_flight(key.max_in_flight))
        if key.requests_per_minute is not None:
            self._spend(holder, key.requests_per_minute)
        holder.in_flight += 1
        return holder

    def check(self, named: Mapping[bytes, bytes]) -> None:
        """Check that a known key is there where keys are set. Raises GatewayError: 401."""
        if self._holders:
            self._find(named)

    def leave(self, holder: Holder | None) -> None:
        """Note that the request has ended."""
        if holder is not None:
            holder.in_flight -= 1

    def _spend(self, holder: Holder, per_minute: int) -> None:
        now = self._clock()
        holder.tokens = min(float(per_minute), holder.tokens + (now - holder.filled_s) * per_minute / 60)
        holder.filled_s = now
        if holder.tokens < 1 - ROUNDING:
            error = errors.too_often(math.ceil((1 - holder.tokens) * 60 / per_minute - ROUNDING))
            raise self._refuse(holder, error)
        holder.tokens -= 1

    def _refuse(self, holder: Holder, error: GatewayError) -> GatewayError:
        """So that it is seen who is over a limit."""
        holder.refused += 1
        error.key = holder.name
        return error

    def _find(self, named: Mapping[bytes, bytes]) -> Holder:
        """OpenAI's clients send a bearer token, Anthropic's the header x-api-key."""
        secret = named.get(b"x-api-key")
        if secret is None:
            kind, _, given = named.get(b"authorization", b"").partition(b" ")
            secret = given.strip() if kind.lower() == b"bearer" else b""
        known_by = hashlib.blake2b(secret, key=self._salt, digest_size=16).digest()
        if (known := self._found.get(known_by)) is not None:
            return known
        digest = hashlib.sha256(secret).digest()
        found = None
        for holder in self._holders:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, holder.digest):
                found = holder
        if not secret:
            raise errors.missing_key()
        if found is None:
            raise errors.wrong_key()
        self._found[known_by] = found
        return found
