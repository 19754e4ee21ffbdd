"""What Prometheus scrapes of models whose engines the gateway owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from laguna_serve.serving.gateway.telemetry.metrics import Distribution


class ShownModel(Protocol):
    """A model, as far as it matters here."""

    in_flight: int
    loads: int
    failed: int
    evictions: int
    load_seconds: Distribution

    @property
    def state(self) -> str: ...
    @property
    def waiting(self) -> Sequence[object]: ...
    @property
    def held_bytes(self) -> int: ...


class OwnedMetrics:
    """A collector of the models, by name; `states` are all that one may be in."""

    def __init__(self, models: Mapping[str, ShownModel], states: Sequence[str]) -> None:
        self._models, self._states = models, states

    def collect(self) -> Iterator[Metric]:
        """All of it, for a scrape; nothing where the gateway owns no engine."""
        if not self._models:
            return
        state = GaugeMetricFamily("laguna_gateway_model_state", "1: the model is in this state.", labels=_STATE)
        gauges = {name: GaugeMetricFamily(f"laguna_gateway_model_{name}", h, labels=_MODEL) for name, h in _GAUGES}
        counters = {
            name: CounterMetricFamily(f"laguna_gateway_model_{name}", h, labels=_MODEL) for name, h in _COUNTERS
        }
        seconds = HistogramMetricFamily("laguna_gateway_model_load_seconds", _LOAD_SECONDS, labels=_MODEL)
        for name, model in self._models.items():
            for each in self._states:
                state.add_metric((name, each), float(model.state == each))
            gauges["memory_bytes"].add_metric([name], model.held_bytes)
            gauges["waiting"].add_metric([name], len(model.waiting))
            gauges["in_flight"].add_metric([name], model.in_flight)
            counters["loads"].add_metric([name], model.loads)
            counters["load_failures"].add_metric([name], model.failed)
            counters["evictions"].add_metric([name], model.evictions)
            seconds.add_metric([name], model.load_seconds.list_buckets(), model.load_seconds.total)
        yield from (state, *gauges.values(), *counters.values(), seconds)


_MODEL, _STATE = ("model",), ("model", "state")
_GAUGES = (
    ("memory_bytes", "Bytes of its group's memory that it holds: planned while it loads, then measured."),
    ("waiting", "Requests that wait until it is loaded."),
    ("in_flight", "Requests that it serves."),
)
_COUNTERS = (
    ("loads", "How often it was loaded, or woken."),
    ("load_failures", "How often its engine could not be started, or died."),
    ("evictions", "How often it went because another one needed its room."),
)
_LOAD_SECONDS = "From the decision to load it until it answered its first request."
