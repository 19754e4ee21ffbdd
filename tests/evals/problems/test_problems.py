"""Reading HumanEval's schema, and refusing what is not in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.evals.problems import SHIPPED, Problem, ProblemsError, load_problems

ITEM = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return '\u2028'\n",
    "test": "def check(candidate):\n    assert candidate(1)\n",
    "base_input": [[1]],  # HumanEval+ has more fields
}


def write(path: Path, *items: Any) -> Path:
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_problems_are_read_in_order(tmp_path: Path, name: str) -> None:
    bare = {key: value for key, value in ITEM.items() if key != "canonical_solution"} | {"task_id": "HumanEval/1"}
    problems = load_problems(write(tmp_path / name, ITEM, bare))
    assert problems[0] == Problem("HumanEval/0", "def f(x):\n", "f", ITEM["test"], "    return '\u2028'\n")
    assert (problems[1].task_id, problems[1].canonical_solution) == ("HumanEval/1", None)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "expected lines of HumanEval's schema, got an empty file"),
        ([ITEM, [1]], ":2: expected an object of HumanEval's schema, got a list"),
        ([ITEM, ITEM], ":2: expected distinct task_ids, got 'HumanEval/0' of line 1 again"),
        ([{**ITEM, "entry_point": ""}], ":1: expected a text as \"entry_point\", got ''"),
        ([{**ITEM, "entry_point": "f(x)"}], ':1: expected a function\'s name as "entry_point"'),
        ([{**ITEM, "canonical_solution": 3}], ':1: expected a text as "canonical_solution", got 3'),
        ([{**ITEM, "test": "def check(:"}], ':1: expected Python as "test"'),
        ([{**ITEM, "test": "x = 1\n"}], ':1: expected a "test" that defines check(candidate), got none'),
        ([{**ITEM, "prompt": "def f(x):\n  '\ud800'\n"}], ":1: expected whole characters"),
        ([{**ITEM, "task_id": "\ud800"}], ':1: expected whole characters as "task_id"'),
        ([{**ITEM, "canonical_solution": "\ud800"}], ':1: expected whole characters as "canonical_solution"'),
        ([{**ITEM, "entry_point": "class"}], ':1: expected a function\'s name as "entry_point"'),
        ([{key: value for key, value in ITEM.items() if key != "test"}], ':1: expected a text as "test", got nothing'),
    ],
)
def test_bad_problems_are_refused_with_their_line(tmp_path: Path, items: list[Any], message: str) -> None:
    path = write(tmp_path / "p.jsonl", *items)
    with pytest.raises(ProblemsError) as caught:
        load_problems(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.jsonl", None, "expected a problems file, got No such file"),
        ("p.jsonl", b"{broken\n", ":1: expected one JSON object, got invalid JSON"),
        ("p.jsonl", b'{"n": %s}\n' % (b"1" * 5000), ":1: expected one JSON object, got invalid JSON"),
        ("p.json", b"[%s]" % (b"1" * 5000), "expected one JSON array, got invalid JSON"),
        ("p.jsonl", b"\xff\xfe", "expected UTF-8 text"),
        ("p.parquet", b"PAR1\x15\xff", "convert it .parquet, say. to JSON Lines"),
        ("p.jsonl.gz", b"plain", "expected a gzip file"),
        ("p.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "expected a gzip file"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ProblemsError, match=message):
        load_problems(tmp_path / name)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz"])
def test_mark_of_the_encoding_is_no_part_of_the_file(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + (json.dumps([ITEM]) if name == "p.json" else json.dumps(ITEM) + "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [problem.task_id for problem in load_problems(tmp_path / name)] == [ITEM["task_id"]]


def test_shipped_problems_are_many_and_have_solutions() -> None:
    problems = load_problems(SHIPPED)
    assert len(problems) >= 40
    assert all(problem.canonical_solution for problem in problems)
