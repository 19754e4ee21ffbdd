"""The one error of decoding masked diffusion models: a line that says what to put right."""

from __future__ import annotations


class DiffusionError(ValueError):
    """A checkpoint, option or request that cannot be used; *subject: expected X, got Y; do Z*."""
