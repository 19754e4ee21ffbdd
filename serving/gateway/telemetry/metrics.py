"""What Prometheus scrapes: requests by outcome, times and tokens of every engine, and the state of the engines.

Written several times per event of a stream, so the numbers are plain attributes; they become samples at a scrape.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/embeddings")
KNOWN_PATHS = frozenset((*OPENAI_PATHS, "/v1/messages", "/tokenize", "/detokenize", "/inference/v1/generate"))
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
STEP_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 4)
ADDED_SECONDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2, 1e-1)


class Distribution:
    """A histogram: `add` is two machine words of work, where prometheus_client's takes a lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def mean(self) -> float | None:
        """Of all values; None without any."""
        count = sum(self.counts)
        return self.total / count if count else None

    def list_buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        found, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found


class EngineStats:
    """Of one engine, since the gateway has known it; seconds."""

    __slots__ = ("added_chunk", "added_request", "first", "gap", "itl", "losses", "prompt_tokens", "tokens")

    def __init__(self) -> None:
        self.first = Distribution(SECONDS)
        self.gap = Distribution(STEP_SECONDS)
        self.itl = Distribution(STEP_SECONDS)
        self.added_request = Distribution(ADDED_SECONDS)
        self.added_chunk = Distribution(ADDED_SECONDS)
        self.tokens = self.prompt_tokens = self.losses = 0


class ShownEngine(Protocol):
    """An engine, as far as it matters here."""

    stats: EngineStats
    in_flight: int
    restarts: int

    @property
    def name(self) -> str: ...
    @property
    def up(self) -> bool: ...


class ShownPool(Protocol):
    """A model's engines, as far as they matter here."""

    @property
    def queued(self) -> int: ...
    @property
    def engines(self) -> Sequence[ShownEngine]: ...


class ShownBacklog(Protocol):
    """Bodies that are with no engine yet."""

    @property
    def total(self) -> int: ...


class Metrics:
    """One gateway's registry.

    `backlog` and `pools` are the relay's; `reload_taken`: the last configuration that was read was also taken;
    `reloaded_s`: when one was, in seconds of the epoch.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Distribution(SECONDS)
        self.requests: dict[tuple[str, int], int] = {}
        self.refusals: dict[tuple[str, str], int] = {}
        self.fallbacks: dict[tuple[str, str, str], int] = {}
        self.pools: Mapping[str, ShownPool] = {}
        self.backlog: ShownBacklog | None = None
        self.reload_taken, self.reloaded_s = True, time.time()
        self.registry.register(self)
        # Memory, open files and their limit; by a name of their own, as engines have theirs under the usual one.
        ProcessCollector(namespace="laguna_gateway", registry=self.registry)

    def note(self, path: str, status: int, seconds: float) -> None:
        """Note that a request has ended.

        Paths that nobody serves share a label, or a scanner would make them without end.
        """
        key = (path if path in KNOWN_PATHS else "other", status)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.seconds.add(seconds)

    def note_refusal(self, reason: str, key: str) -> None:
        """Note that the gateway has not given a request an engine's answer, or not all of it."""
        self.refusals[reason, key] = self.refusals.get((reason, key), 0) + 1

    def note_fallback(self, model: str, other: str, reason: str) -> None:
        """Note that a request for a model goes to another one."""
        self.fallbacks[model, other, reason] = self.fallbacks.get((model, other, reason), 0) + 1

    def note_reload(self, taken: bool) -> None:
        """Note that the configuration was read again, and whether it was taken."""
        self.reload_taken = taken
        self.reloaded_s = time.time() if taken else self.reloaded_s

    async def render(self) -> bytes:
        """Render the text of /metrics, in Prometheus' exposition format.

        All is taken at one moment, and written in a thread: of thousands of keys that is a second's work.
        """
        return await asyncio.to_thread(generate_latest, _Taken(self.registry.collect()))

    def collect(self) -> Iterator[Metric]:
        """All of it, for a scrape."""
        requests = CounterMetricFamily("laguna_gateway_requests", "Requests by path and status.", labels=_PATH)
        for (path, status), count in self.requests.items():
            requests.add_metric((path, str(status)), count)
        yield requests
        help_text = (
            "Requests that got an error of the gateway's own, by reason (key_rate, key_tokens, key_budget,"
            " key_in_flight: the key's limits;"
            " queue_full, queue_bytes_full, queue_timeout: no slot; no_engine, engine_unreachable,"
            " engine_lost, engine_silent: the engines;"
            " unauthorized, unknown_model, ...) and by the name of the key, where one was known."
        )
        refusals = CounterMetricFamily("laguna_gateway_refusals", help_text, labels=("reason", "key"))
        for refusal, count in self.refusals.items():
            refusals.add_metric(refusal, count)
        yield refusals
        help_text = "Requests that went to another model, by the rule of theirs, and for which refusal."
        fallbacks = CounterMetricFamily("laguna_gateway_fallbacks", help_text, labels=("model", "other", "reason"))
        for fallback, count in self.fallbacks.items():
            fallbacks.add_metric(fallback, count)
        yield fallbacks
        help_text = "From the first byte in to the last one out."
        seconds = HistogramMetricFamily("laguna_gateway_request_seconds", help_text)
        seconds.add_metric([], self.seconds.list_buckets(), self.seconds.total)
        yield seconds
        yield from self._collect_state()
        yield from self._collect_engines()

    def _collect_state(self) -> Iterator[Metric]:
        help_text = "Bytes of requests that arrive or wait for a slot; limits.max_queued_bytes bounds them."
        yield GaugeMetricFamily("laguna_gateway_queued_bytes", help_text, self.backlog.total if self.backlog else 0)
        name, help_text = "laguna_gateway_config_last_reload_successful", "1: the last configuration read was taken."
        yield GaugeMetricFamily(name, help_text, float(self.reload_taken))
        name = "laguna_gateway_config_last_reload_success_timestamp_seconds"
        yield GaugeMetricFamily(name, "When a configuration was taken, since the epoch.", self.reloaded_s)

    def _collect_engines(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("laguna_gateway_queued", "Requests that wait for a slot.", labels=("model",))
        gauges = {
            "up": GaugeMetricFamily("laguna_gateway_upstream_up", "1: it may be sent requests.", labels=_ENGINE),
            "in_flight": GaugeMetricFamily("laguna_gateway_upstream_in_flight", "Requests in it.", labels=_ENGINE),
        }
        counters = {
            name: CounterMetricFamily(f"laguna_gateway_{name}", help_text, labels=_ENGINE)
            for name, help_text in _COUNTERS.items()
        }
        histograms = {
            name: HistogramMetricFamily(f"laguna_gateway_{metric}", help_text, labels=_ENGINE)
            for name, (metric, help_text) in _HISTOGRAMS.items()
        }
        for model, pool in self.pools.items():
            queued.add_metric([model], pool.queued)
            for engine in pool.engines:
                labels = [model, engine.name]
                gauges["up"].add_metric(labels, float(engine.up))
                gauges["in_flight"].add_metric(labels, engine.in_flight)
                counters["upstream_restarts"].add_metric(labels, engine.restarts)
                counters["output_tokens"].add_metric(labels, engine.stats.tokens)
                counters["prompt_tokens"].add_metric(labels, engine.stats.prompt_tokens)
                counters["upstream_lost"].add_metric(labels, engine.stats.losses)
                for name, family in histograms.items():
                    found: Distribution = getattr(engine.stats, name)
                    family.add_metric(labels, found.list_buckets(), found.total)
        yield queued
        yield from (*gauges.values(), *counters.values(), *histograms.values())


class _Taken(Collector):
    """A registry of what was collected at one moment."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """List the families as they were then."""
        return self._families


_PATH, _ENGINE = ("path", "status"), ("model", "upstream")
_COUNTERS = {
    "upstream_restarts": "How often laguna serve has started it again after its death.",
    "output_tokens": "Tokens of answers, where an answer tells its usage.",
    "prompt_tokens": "Tokens of prompts, where an answer tells its usage.",
    "upstream_lost": "Times that the engine was found down, by health checks or by connections that failed.",
}
_HISTOGRAMS = {
    "first": ("ttft_seconds", "From the request to the first bytes of its answer's body."),
    "itl": ("itl_seconds", "Between two tokens: a stream's mean, where it tells its usage."),
    "gap": ("chunk_gap_seconds", "Between two chunks of a stream."),
    "added_request": ("added_request_seconds", "The gateway's own time per request, without waiting for a slot."),
    "added_chunk": ("added_chunk_seconds", "The gateway's own time per chunk of an answer."),
}
