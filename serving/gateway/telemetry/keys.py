"""What Prometheus scrapes of keys: labels are names of the configuration alone, keys' and models'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class ShownTally(Protocol):
    """What was used of a model."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    refused: int


class ShownKey(Protocol):
    """A key, as far as it matters here."""

    in_flight: int

    @property
    def name(self) -> str: ...
    @property
    def since_start(self) -> Mapping[str, ShownTally]: ...
    @property
    def used_today(self) -> int: ...
    @property
    def budget_left(self) -> int | None: ...


class ShownKeyring(Protocol):
    """All keys of a gateway."""

    @property
    def holders(self) -> Sequence[ShownKey]: ...


class KeyMetrics:
    """A collector of the keys that are configured at the moment of a scrape."""

    def __init__(self, keyring: ShownKeyring) -> None:
        self._keyring = keyring

    def collect(self) -> Iterator[Metric]:
        """All of it, for a scrape."""
        counters = {
            name: CounterMetricFamily(f"laguna_gateway_key_{name}", help_text, labels=("key", "model"))
            for name, help_text in _COUNTERS.items()
        }
        gauges = {
            name: GaugeMetricFamily(f"laguna_gateway_key_{name}", help_text, labels=("key",))
            for name, help_text in _GAUGES.items()
        }
        for key in self._keyring.holders:
            for model, tally in key.since_start.items():
                for name, family in counters.items():
                    family.add_metric((key.name, model), getattr(tally, name))
            gauges["in_flight"].add_metric([key.name], key.in_flight)
            gauges["tokens_today"].add_metric([key.name], key.used_today)
            if (left := key.budget_left) is not None:
                gauges["budget_left_tokens"].add_metric([key.name], left)
        yield from (*counters.values(), *gauges.values())


_COUNTERS = {
    "requests": "Requests of a key that an engine had, by model.",
    "prompt_tokens": "Tokens of their prompts, as the key was charged for them.",
    "output_tokens": "Tokens of their answers, as the key was charged for them.",
    "refused": "Requests over the key's limits; the model is empty where it was not known yet.",
}
_GAUGES = {
    "in_flight": "Requests of the key at this moment.",
    "tokens_today": "Tokens that count for the key's budget of this day (UTC).",
    "budget_left_tokens": "What is left of that budget, without what requests in flight may cost; for keys with one.",
}
