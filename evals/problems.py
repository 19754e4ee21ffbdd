"""Code problems in HumanEval's JSONL schema, so that a user's own HumanEval or HumanEval+ file works unchanged.

Each line is an object with `task_id`, `prompt` (the beginning of a program that ends in an unfinished function),
`entry_point` (the function's name), `test` (Python that defines `check(candidate)`) and, if there is one,
`canonical_solution` (what completes the prompt) and `open_ended` (true: answers of other lengths than the canonical
solution's may be right). Other fields are passed over. Bad input is refused before anything is
sent, with the file and the line: an evaluation that skips problems silently measures something else.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent / "problem_sets" / "original.jsonl"
REQUIRED = ("task_id", "prompt", "entry_point", "test")


class ProblemsError(ValueError):
    """A problems file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `prompt` + `canonical_solution` is a whole program; `test` defines `check(candidate)`. `open_ended`:
    there are many right answers, of other lengths than the canonical solution's."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str | None
    open_ended: bool = False


def load_problems(path: Path) -> list[Problem]:
    """Read every problem of a `.jsonl` or `.jsonl.gz` file, in order.

    Raises:
        ProblemsError: the file is missing, unreadable or empty, or a line is no problem or repeats a `task_id`.
    """
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        problem = _parse_line(f"{path}:{number}", line)
        if (first := seen.setdefault(problem.task_id, number)) != number:
            expected = f"expected distinct task_ids, got {problem.task_id!r} of line {first} again"
            raise ProblemsError(f"{path}:{number}: {expected}; remove one")
        problems.append(problem)
    if not problems:
        raise ProblemsError(f"{path}: expected lines of HumanEval's schema, got an empty file; add problems")
    return problems


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise ProblemsError(f"{path}: expected UTF-8 text, got {error}; re-encode the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProblemsError(f"{path}: expected a gzip file, got {error}; fetch it again") from error
    except OSError as error:
        raise ProblemsError(f"{path}: expected a problems file, got {error.strerror}; check --problems") from error


def _parse_line(where: str, line: str) -> Problem:
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProblemsError(f"{where}: expected one JSON object, got invalid JSON ({error}); fix the line") from error
    if not isinstance(item, dict):
        raise ProblemsError(f"{where}: expected an object of HumanEval's schema, got a {type(item).__name__}; fix it")
    for field in REQUIRED:
        if not isinstance(item.get(field), str) or not item[field]:
            raise ProblemsError(f'{where}: expected a text as "{field}", got {_show(item.get(field))}; add it')
    canonical = item.get("canonical_solution")
    if canonical is not None and not isinstance(canonical, str):
        raise ProblemsError(f'{where}: expected a text as "canonical_solution", got {_show(canonical)}; fix it')
    if not item["entry_point"].isidentifier():
        raise ProblemsError(f'{where}: expected a function\'s name as "entry_point", got {_show(item["entry_point"])}')
    open_ended = item.get("open_ended", False)
    if not isinstance(open_ended, bool):
        raise ProblemsError(f'{where}: expected true or false as "open_ended", got {_show(open_ended)}; fix it')
    _require_check(where, item["test"])
    return Problem(item["task_id"], item["prompt"], item["entry_point"], item["test"], canonical, open_ended)


def _require_check(where: str, test: str) -> None:
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ProblemsError(f'{where}: expected Python as "test", got {error}; fix it') from error
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise ProblemsError(f'{where}: expected a "test" that defines check(candidate), got none; add it')


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]
