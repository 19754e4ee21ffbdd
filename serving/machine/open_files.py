"""The limit of open files, of which every connection is one: most systems begin with 1,024 in all (litellm#6284)."""

from __future__ import annotations

import contextlib
import resource


def raise_limit() -> int:
    """Raise this process's soft limit to the hard one. Returns the limit that holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems have a lower one beside it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return find_limit()


def find_limit() -> int:
    """Find the soft limit; a very large number where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def find_hard_limit() -> int:
    """Find the limit that `raise_limit` raises it to; a very large number where there is none."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hard if hard != resource.RLIM_INFINITY else 1 << 30
