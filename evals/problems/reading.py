"""Code problems from the files that their authors publish: HumanEval's, evalplus's, MBPP's and CRUXEval's.

A file is JSON Lines, plain or gzipped, or one JSON array. Which form it has is read from its fields:

    humaneval   task_id, prompt, entry_point, test (Python that defines `check(candidate)`), canonical_solution if there
                is one, and `open_ended` (true: answers of other lengths than the canonical solution's may be right)
    evalplus    HumanEvalPlus.jsonl and MbppPlus.jsonl: task_id, prompt, entry_point, canonical_solution, base_input,
                plus_input, atol
    mbpp        mbpp.jsonl (text) or sanitized-mbpp.json (prompt): task_id, code, test_list, test_imports or
                test_setup_code
    mbpp-plus   MBPP+ as on the hub: mbpp's fields and `test`, a script of all tests
    cruxeval    code, input, output, id

Other fields are passed over. Bad input is refused before anything is sent, with the file and the line: an evaluation
that skips problems silently measures something else.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from keyword import iskeyword
from pathlib import Path
from typing import Any

from laguna_serve.evals.problems.cruxeval_rows import read_cruxeval
from laguna_serve.evals.problems.evalplus_rows import read_evalplus
from laguna_serve.evals.problems.mbpp_rows import read_mbpp, read_mbpp_plus
from laguna_serve.evals.problems.mbpp_splits import choose_split
from laguna_serve.evals.problems.problem import Problem, ProblemsError
from laguna_serve.evals.problems.protocols import ask_by, choose_protocol
from laguna_serve.serving.kit.files import is_whole
from laguna_serve.serving.kit.results import JsonObject

__all__ = ["SHIPPED", "Problem", "ProblemsError", "find_form", "load_problems", "read_rows"]

SHIPPED = Path(__file__).resolve().parents[1] / "problem_sets" / "original.jsonl"
REQUIRED = ("task_id", "prompt", "entry_point", "test")


def load_problems(path: Path, protocol: str = "", split: str = "") -> list[Problem]:
    """Read every problem of a file, in order.

    Args:
        protocol: how a model is asked (protocols.py); the first that the file's form allows if empty.
        split: of MBPP's files alone, one of its splits (mbpp_splits.py); all rows if empty.

    Raises:
        ProblemsError: the file is missing, unreadable or empty, a line is no problem or repeats a `task_id`, or the
            form knows no such protocol or split.
    """
    rows = list(read_rows(path))
    if not rows:
        raise ProblemsError(f"{path}: expected lines of HumanEval's schema, got an empty file; add problems")
    form = find_form(rows[0][1])
    chosen = choose_protocol(form, protocol)
    if split:
        rows = choose_split(rows, split, form, str(path))
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        if (other := find_form(row)) != form:
            raise ProblemsError(f"{where}: expected one form in a file, {form} by its first row, got {other}; split it")
        problem = ask_by(chosen, READERS[form](where, row, chosen))
        _require_whole(where, problem)
        if (first := seen.setdefault(problem.task_id, where)) != where:
            line = first.rpartition(":")[2]
            expected = f"expected distinct task_ids, got {problem.task_id!r} of line {line} again"
            raise ProblemsError(f"{where}: {expected}; remove one")
        problems.append(problem)
    return problems


def _require_whole(where: str, problem: Problem) -> None:
    """Refuse half a surrogate pair in any text: nobody can be asked it, and no table can name it."""
    for name in ("prompt", "task_id", "canonical_solution", "test", "base_test", "asked", "message"):
        if not is_whole(getattr(problem, name) or ""):
            what = "the prompt" if name == "prompt" else f'"{name}"'
            raise ProblemsError(f"{where}: expected whole characters as {what}, got half a surrogate pair; fix it")


def find_form(row: JsonObject) -> str:
    """Find a form's name, from the fields of a row."""
    if row.keys() >= {"base_input", "plus_input"}:
        return "evalplus"
    if row.keys() >= {"code", "test_list"}:
        return "mbpp-plus" if "test" in row else "mbpp"
    return "cruxeval" if row.keys() >= {"code", "input", "output"} else "humaneval"


def read_rows(path: Path) -> Iterator[tuple[str, JsonObject]]:
    """Every row with its place, as "file:line" (of an array, the number of the item).

    Raises:
        ProblemsError: the file cannot be read, or a row is no object.
    """
    text = _read_text(path)
    lines: list[tuple[int, Any]] = []
    if text.lstrip().startswith("[") and path.name.removesuffix(".gz").endswith(".json"):
        try:
            lines = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
            raise ProblemsError(f"{path}: expected one JSON array, got invalid JSON ({error}); fix it") from error
    else:
        lines = [(at, line) for at, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        where = f"{path}:{number}"
        item = _parse_line(where, line) if isinstance(line, str) else line
        if not isinstance(item, dict):
            expected = "expected an object of HumanEval's schema"
            raise ProblemsError(f"{where}: {expected}, got a {type(item).__name__}; fix it")
        yield where, item


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        # Editors on Windows put a mark of the encoding before a text.
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        expected = "expected UTF-8 text (JSON, plain or as .gz)"
        remedy = "re-encode the file, or convert it (parquet, say) to JSON Lines"
        raise ProblemsError(f"{path}: {expected}, got {error}; {remedy}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProblemsError(f"{path}: expected a gzip file, got {error}; fetch it again") from error
    except OSError as error:
        raise ProblemsError(f"{path}: expected a problems file, got {error.strerror}; check --problems") from error


def _parse_line(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProblemsError(f"{where}: expected one JSON object, got invalid JSON ({error}); fix the line") from error


def read_humaneval(where: str, item: JsonObject, _: str) -> Problem:
    """Read a row of HumanEval's schema.

    Raises:
        ProblemsError: a field is missing or of another kind.
    """
    for field in REQUIRED:
        if not isinstance(item.get(field), str) or not item[field]:
            raise ProblemsError(f'{where}: expected a text as "{field}", got {_show(item.get(field))}; add it')
    canonical = item.get("canonical_solution")
    if canonical is not None and not isinstance(canonical, str):
        raise ProblemsError(f'{where}: expected a text as "canonical_solution", got {_show(canonical)}; fix it')
    if not item["entry_point"].isidentifier() or iskeyword(item["entry_point"]):
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


READERS: dict[str, Callable[[str, JsonObject, str], Problem]] = {
    "humaneval": read_humaneval,
    "evalplus": read_evalplus,
    "mbpp": read_mbpp,
    "mbpp-plus": read_mbpp_plus,
    "cruxeval": read_cruxeval,
}
