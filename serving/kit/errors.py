"""Errors that end a command in one line, not in a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """What a user can put right, or has to know: *subject: expected X, got Y; do Z*."""
