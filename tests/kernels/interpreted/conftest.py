"""Nothing here is collected unless Triton interprets its kernels, which is decided when it is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in an order of their own, not a BLAS's: see fixed_dot.py."""
    from fixed_dot import fixed_order_dot
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", fixed_order_dot)
