"""Who may ask: the keys of the configuration, found by what a request carries.

Keys are kept by their SHA-256, and found by a keyed hash, whose lookup tells by its time nothing that could be used.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence

from laguna_serve.serving.gateway.access.holder import Clock, Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.wire import errors

# A key that was taken out is known for so long, and while it has requests in flight: a minute's limits have come back.
GONE_S = 60.0
MakeHolder = Callable[[Key, Ledger, Clock, Clock], Holder]


class Keyring:
    """The configured keys; unless it is `closed`, everybody may ask where there are none."""

    def __init__(
        self, ledger: Ledger, clock: Clock = time.monotonic, wall: Clock = time.time, make: MakeHolder = Holder
    ) -> None:
        self.ledger, self._make, self._clock, self._wall = ledger, make, clock, wall
        self._holders: list[Holder] = []
        # Those that were taken out, and when.
        self._gone: dict[str, tuple[Holder, float]] = {}
        # By a keyed hash of their digest, and those that have been found by one of the key itself: OpenSSL's SHA-256
        # alone takes 30 µs of a request that comes after a pause.
        self._by_digest: dict[bytes, Holder] = {}
        self._found: dict[bytes, Holder] = {}
        self._salt = os.urandom(16)
        self.enabled = False

    @property
    def holders(self) -> Sequence[Holder]:
        """The keys and their load."""
        return self._holders

    def configure(self, keys: Sequence[Key], *, closed: bool = False) -> None:
        """Take the keys; what a key of the same name has in flight, and has used of its limits, stays counted.

        So it does where it was taken out and comes back. `closed`: a request needs a key though there is none any more.
        """
        now = self._clock()
        left = {name: gone for name, gone in self._gone.items() if gone[0].in_flight or now - gone[1] < GONE_S}
        left |= {holder.name: (holder, now) for holder in self._holders}
        known = {name: holder for name, (holder, _) in left.items()}
        holders = []
        for key in keys:
            if (holder := known.get(key.name)) is not None:
                holder.configure(key)
            else:
                holder = self._make(key, self.ledger, self._clock, self._wall)
            holders.append(holder)
        self._holders, self.enabled = holders, bool(holders) or closed
        names = {key.name for key in keys}
        self._gone = {name: gone for name, gone in left.items() if name not in names}
        self._by_digest = {self._hash(holder.digest): holder for holder in holders}
        self._found.clear()

    def find(self, named: Mapping[bytes, bytes]) -> Holder | None:
        """Find the key in the request's headers; None where no keys are set. Raises GatewayError: 401."""
        if not self.enabled:
            return None
        # OpenAI's clients send a bearer token, Anthropic's the header x-api-key.
        secret = named.get(b"x-api-key", b"").strip()  # the parser leaves blanks behind a value
        if not secret:  # also of a client whose variable for it is empty
            kind, _, given = named.get(b"authorization", b"").partition(b" ")
            secret = given.strip() if kind.lower() == b"bearer" else b""
        known_by = self._hash(secret)
        if (known := self._found.get(known_by)) is not None:
            return known
        if not secret:
            raise errors.missing_key()
        if (found := self._by_digest.get(self._hash(hashlib.sha256(secret).digest()))) is None:
            raise errors.wrong_key()
        self._found[known_by] = found
        return found

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).digest()
