"""What goes wrong with an endpoint."""

from __future__ import annotations


class EndpointError(RuntimeError):
    """An endpoint that gave no answer, or not the one that its API promises; one line."""
