"""Addresses of endpoints, as people give them."""

from __future__ import annotations


def find_root(url: str) -> str:
    """Find where a server's paths begin: without the slash at the end, and the /v1 that OpenAI's clients want."""
    return url.rstrip("/").removesuffix("/v1")
