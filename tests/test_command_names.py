"""What a command calls itself can be called: hints say `scripts/x.py --help`, from the repository's folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "evals", "scripts", "serving")
FEWEST = 50


def list_names() -> Iterator[tuple[str, str]]:
    """Every file's constant names of commands: the first argument of Command, and `prog`."""
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            given = [keyword.value for keyword in call.keywords if keyword.arg == "prog"]
            if isinstance(call.func, ast.Name) and call.func.id == "Command":
                given += call.args[:1]
            for value in given:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield path.relative_to(ROOT).as_posix(), value.value


@pytest.mark.slow
def test_names_of_commands_are_paths_or_modules() -> None:
    names = [*list_names()]
    assert len(names) > FEWEST
    unknown = []
    for file, name in names:
        first = name.split()[0]
        module = ROOT.joinpath(*first.split(".")[1:]).with_suffix(".py")
        if (
            first != "laguna"
            and not (ROOT / first).exists()
            and not (first.startswith("laguna_serve.") and module.exists())
        ):
            unknown.append((file, name))
    assert not unknown
