"""What goes wrong with an endpoint."""

from __future__ import annotations

from laguna_serve.serving.kit.errors import CommandError


class EndpointError(CommandError, RuntimeError):
    """An endpoint that gave no answer, or not the one that its API promises; one line."""


class RefusedError(EndpointError):
    """An endpoint that does not take a request for what is in it: a prompt longer than its context, say."""
