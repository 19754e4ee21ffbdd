"""Where the user's files are that are made again when they are gone."""

from __future__ import annotations

import os
from pathlib import Path


def find_caches() -> Path:
    """Find the folder of every program's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def find_own_cache() -> Path:
    """Find this project's folder among them, which need not be there yet."""
    return find_caches() / "laguna-serve"
