"""Prometheus' text format, read by Prometheus' own parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laguna_serve.serving.client.errors import EndpointError

if TYPE_CHECKING:
    from prometheus_client.samples import Sample


def read_samples(text: str) -> list[Sample]:
    """All samples of an exposition.

    Raises:
        EndpointError: it is none.
    """
    from prometheus_client.parser import text_string_to_metric_families  # `laguna doctor` must start without it

    try:
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, TypeError, LookupError) as error:
        raise EndpointError(f"/metrics: expected a Prometheus exposition, got {error}") from None
