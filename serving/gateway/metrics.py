"""What Prometheus is told: requests by outcome and duration, and the state of every engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from laguna_serve.serving.gateway.pool import Pool

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/embeddings")
KNOWN_PATHS = frozenset((*OPENAI_PATHS, "/v1/messages", "/tokenize", "/detokenize", "/inference/v1/generate"))
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class HasPools(Protocol):
    """The relay, as far as it matters here."""

    pools: dict[str, Pool]


class Metrics:
    """One gateway's registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        help_text = "Requests by path and status."
        self._requests = Counter("laguna_gateway_requests", help_text, labels, registry=self.registry)
        name, help_text = "laguna_gateway_request_seconds", "From the first byte in to the last one out."
        self._seconds = Histogram(name, help_text, registry=self.registry, buckets=SECONDS)
        name, help_text = "laguna_gateway_ttft_seconds", "From the request to the first bytes of its answer's body."
        self._first = Histogram(name, help_text, registry=self.registry, buckets=SECONDS)

    def watch(self, relay: HasPools) -> None:
        """Show the engines' state at every scrape."""
        self.registry.register(_Engines(relay))

    def note(self, path: str, status: int, started_s: float, first_s: float | None) -> None:
        """A request has ended that began at `started_s` and had its first bytes at `first_s` (perf_counter). Paths that
        nobody serves share a label, or a scanner would make them without end."""
        self._requests.labels(path if path in KNOWN_PATHS else "other", str(status)).inc()
        self._seconds.observe(time.perf_counter() - started_s)
        if first_s is not None:
            self._first.observe(first_s - started_s)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)


class _Engines:
    def __init__(self, relay: HasPools) -> None:
        self._relay = relay

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ("model", "upstream")
        help_text = "1 for an engine that may be sent requests."
        up = GaugeMetricFamily("laguna_gateway_upstream_up", help_text, labels=labels)
        busy = GaugeMetricFamily("laguna_gateway_upstream_in_flight", "Requests in an engine.", labels=labels)
        queued = GaugeMetricFamily("laguna_gateway_queued", "Requests that wait for a slot.", labels=labels[:1])
        for pool in self._relay.pools.values():
            queued.add_metric([pool.model.name], pool.queued)
            for engine in pool.engines:
                names = [pool.model.name, engine.config.name]
                up.add_metric(names, float(engine.is_up(pool.clock())))
                busy.add_metric(names, engine.in_flight)
        yield from (up, busy, queued)
