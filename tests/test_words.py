"""The project's words: docstrings that say something, and the field's terms where users read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "evals", "kernels", "plugins", "scripts", "serving")
FEWEST_WORDS = 4
HOUSE_WORDS = re.compile(r"\b(?:told|untold|mend|mends|mended|mending|by turns|stand-ins?|unwalled)\b", re.IGNORECASE)
# Published, so kept: the text as it is in the code, and why.
PUBLISHED = {"cannot be told": "a verdict in laguna_serve.rollouts/1, which programs compare"}
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def list_trees() -> Iterator[tuple[Path, ast.Module]]:
    """Every product file and what it parses to."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def list_documented(tree: ast.Module) -> Iterator[tuple[Documented, ast.Constant]]:
    """What has a docstring, with its constant."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Constant)
            yield node, statement.value


def find_short(tree: ast.Module) -> list[str]:
    """Lines and docstrings of fewer than FEWEST_WORDS words, on anything but dunder methods."""
    return [
        f"{docstring.lineno}: {docstring.value}"
        for node, docstring in list_documented(tree)
        if not getattr(node, "name", "").startswith("__") and len(str(docstring.value).split()) < FEWEST_WORDS
    ]


def find_house_words(tree: ast.Module) -> list[str]:
    """Lines and string constants, not docstrings, that have a word of HOUSE_WORDS and are not PUBLISHED."""
    docstrings = {id(docstring) for _, docstring in list_documented(tree)}
    return [
        f"{node.lineno}: {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if HOUSE_WORDS.search(node.value) and node.value not in PUBLISHED
    ]


@pytest.mark.slow
def test_docstrings_say_something() -> None:
    short = [f"{path}:{found}" for path, tree in list_trees() for found in find_short(tree)]
    assert short == [], f"fewer than {FEWEST_WORDS} words: say what it returns, in which unit, when; or leave it out"


@pytest.mark.slow
def test_strings_have_the_fields_words() -> None:
    assert [f"{path}:{found}" for path, tree in list_trees() for found in find_house_words(tree)] == []


def test_pages_have_the_fields_words() -> None:
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    assert len(pages) > len(PAGES)
    lines = [(path, line) for path in pages for line in path.read_text(encoding="utf-8").splitlines()]
    assert [f"{path.relative_to(ROOT)}: {line}" for path, line in lines if HOUSE_WORDS.search(line)] == []


@pytest.mark.slow
def test_exceptions_are_still_there() -> None:
    constants = (node for _, tree in list_trees() for node in ast.walk(tree) if isinstance(node, ast.Constant))
    assert set(PUBLISHED) <= {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize(
    ("source", "short", "words"),
    [
        ('"""Two words."""', 1, 0),
        ('class A:\n    def __enter__(self):\n        """Itself."""', 0, 0),
        ('class A:\n    def leave(self):\n        """Says it."""', 1, 0),
        ('def f():\n    """The caller is told why it ended."""', 0, 0),
        ('message = f"{name} was Told"', 0, 1),
        ('message = "by turns"', 0, 1),
        ('message = "recommended, a retold tale"', 0, 0),
        ('verdict = "cannot be told"', 0, 0),
    ],
)
def test_what_is_found(source: str, short: int, words: int) -> None:
    tree = ast.parse(source)
    assert (len(find_short(tree)), len(find_house_words(tree))) == (short, words)
