"""Which weights may answer a request: `X-Weight-Policy`, held against the versions of a model's engines.

    any                 every engine's (as without the header)
    latest-only         those of the newest version that is known
    min-version=N       those whose version is N or later
    max-staleness=K     those at most K versions behind the newest

A version's number is the last one in its name: 12 for `step-12`. Weights that were never updated are `default`, 0. A
version without a number is as good as itself alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.wire import errors

HEADER = b"x-weight-policy"
FORMS = re.compile(rb"(latest-only)|(?:(min-version|max-staleness)=([0-9]{1,18}))")
UNVERSIONED_NUMBER = 0


@dataclass(frozen=True, slots=True)
class WeightPolicy:
    """What a request asks of the weights; `number` is N or K."""

    kind: Literal["latest-only", "min-version", "max-staleness"]
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "latest-only" else f"{self.kind}={self.number}"

    def allows(self, version: bytes, latest: bytes) -> bool:
        """Say whether weights of a version may answer, where the newest is `latest`."""
        if self.kind == "latest-only":
            return version == latest
        number, newest = number_of(version), number_of(latest)
        if self.kind == "min-version":
            return number is not None and number >= self.number
        if number is None or newest is None:
            return version == latest
        return newest - number <= self.number


def read_policy(named: Mapping[bytes, bytes]) -> WeightPolicy | None:
    """Read a request's headers; None where it takes any weights. Raises GatewayError: 400 for another value."""
    given = named.get(HEADER, b"any").strip(b" \t")  # the parser leaves blanks behind a value
    if given == b"any":
        return None
    found = FORMS.fullmatch(given)
    if found is None:
        raise errors.bad_weight_policy(given.decode("latin-1"))
    if found[1]:
        return WeightPolicy("latest-only")
    return WeightPolicy("min-version" if found[2] == b"min-version" else "max-staleness", int(found[3]))


def list_allowed(
    engines: list[Engine], policy: WeightPolicy, latest: bytes | None, known: list[Engine]
) -> list[Engine]:
    """List those whose weights may answer: none while that hangs on one that has not said which it has.

    Args:
        engines: that would take the request.
        policy: what it asks of their weights.
        latest: the version that all should have; None where none was set, and each says its own.
        known: all engines of the model, of which one has the newest version.
    Raises:
        GatewayError: 503 there is none.
    """
    reported = [engine for engine in engines if engine.versions_known or latest is not None]
    if len(reported) < len(engines) and policy.kind != "min-version":
        return []
    newest = find_latest(engine.versions[0] for engine in known) if latest is None else latest
    allowed = [engine for engine in reported if policy.allows(engine.versions[0], newest)]
    if not allowed and len(reported) == len(engines):
        raise errors.no_such_weights(str(policy), newest.decode())
    return allowed


def number_of(version: bytes) -> int | None:
    """Return the last number in a version's name; None where there is none."""
    if version == b"default":
        return UNVERSIONED_NUMBER
    numbers = re.findall(rb"[0-9]+", version)
    return int(numbers[-1]) if numbers else None


def find_latest(versions: Iterable[bytes]) -> bytes:
    """Find the version with the largest number; any with one is newer than all without."""
    return max(versions, key=lambda version: -1 if (number := number_of(version)) is None else number)
