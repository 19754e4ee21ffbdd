"""A request's trace, as far as the relay knows of one; otel.py makes it, where there is a place to send it to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from laguna_serve.serving.gateway.wire.headers import Head
from laguna_serve.serving.gateway.wire.redirects import Site


class Stages(NamedTuple):
    """What became of a request, and when (`time.perf_counter`; 0 or None: it did not come to that).

    It was `dispatched_s` to its model, had a slot at `arrived_s`, was with its engine at `sent_s`, of which the first
    and the last bytes came. `usage`: tokens of prompt and answer, where they were told.
    """

    status: int
    key: str | None
    model: str | None
    engine: str | None
    reason: str | None
    fallback_from: str | None
    dispatched_s: float
    arrived_s: float
    sent_s: float | None
    first_s: float | None
    last_s: float
    usage: tuple[int, int] | None


class Trace(Protocol):
    """The spans of one request, until its end."""

    def enter_engine(self, site: Site) -> bytes:
        """Begin the engine's part; returns the header lines that carry the trace on."""

    def end(self, stages: Stages) -> None:
        """End all spans of the request."""


class Tracer(Protocol):
    """Begins the traces of requests."""

    def begin(self, head: Head, started_s: float) -> Trace:
        """Begin a request's, under the one that its `traceparent` names."""

    def close(self) -> None:
        """Send what has not been sent yet."""
