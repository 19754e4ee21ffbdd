"""What docs/api.md promises to callers from Python is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
ROW = re.compile(r"^\| `(laguna_serve[\w.]+)` \| ([^|]+) \|", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_its_table() -> None:
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("module", "names"), ROWS, ids=[module for module, _ in ROWS])
def test_promised_names_are_there(module: str, names: str) -> None:
    promised = [name for code in re.findall(r"`([^`]+)`", names) for name in re.findall(r"\w+", code)]
    assert promised
    found = importlib.import_module(module)
    missing = [name for name in promised if not hasattr(found, name)]
    assert not missing, f"{module}: docs/api.md promises {missing}"
