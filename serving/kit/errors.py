"""Errors that end a command in one line, not in a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """What a user can put right, or has to know: *subject: expected X, got Y; do Z*."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, a library's may be pages; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
