"""The page on the threat model names tests that exist, and every test of the escape suite."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

from laguna_serve.evals.sandbox.trial import Walls

HERE = Path(__file__).parent
PAGE = (HERE.parents[2] / "docs" / "threat-model.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(test_\w+)::(test_\w+)`", PAGE))


def list_tests(path: Path) -> set[tuple[str, str]]:
    functions = ast.parse(path.read_text(encoding="utf-8")).body
    return {(path.stem, each.name) for each in functions if isinstance(each, ast.FunctionDef)}


def test_named_tests_exist() -> None:
    existing = set().union(*(list_tests(path) for path in HERE.parent.rglob("test_*.py")))
    assert len(NAMED) > 30
    assert NAMED - existing == set()


def test_whatever_looks_like_a_test_is_named_in_full() -> None:
    loose = re.findall(r"(?<![:/\w])test_\w+(?!\w|::|\.py)", PAGE)
    assert loose == []


def test_escape_suite_is_on_the_page_as_a_whole() -> None:
    tests = {pair for pair in list_tests(HERE / "test_escapes.py") if pair[1].startswith("test_")}
    assert tests - NAMED == set()


def test_every_mode_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert tuple(rows) == get_args(Walls)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (HERE.parents[2] / "docs" / target).resolve().exists(), target
