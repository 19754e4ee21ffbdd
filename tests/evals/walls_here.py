"""The walls that programs get in these tests: whatever this system can have, chosen as the commands choose them."""

from __future__ import annotations

from typing import Any

import pytest

from laguna_serve.evals.sandbox import JailError, Limits, Walls, choose_walls, find_obstacle


def _choose() -> Walls | None:
    try:
        return choose_walls()
    except JailError:
        return None


WALLS = _choose()
needs_walls = pytest.mark.skipif(WALLS is None, reason="neither namespaces nor bubblewrap nor Landlock")
# What only an own view of the file system, or of the processes, can hide.
needs_namespaces = pytest.mark.skipif(find_obstacle() is not None, reason="no user namespaces")


def make_limits(**given: Any) -> Limits:
    """Limits behind these walls."""
    return Limits(walls=WALLS or "namespaces", **given)
