"""No answer stops whoever reads it: work is linear in the answer (counted, not timed), and readers are replaceable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from humaneval_like import ADD
from hypothesis import given, settings
from hypothesis import strategies as st
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import grade_answer
from laguna_serve.evals.extraction import extract, worker
from laguna_serve.evals.extraction.extract import MAX_ANSWER_CHARS, ExtractionError, make_budget, read_program
from laguna_serve.evals.extraction.parser import Parser
from laguna_serve.evals.extraction.worker import Worker, read_safely

pytestmark = pytest.mark.slow

# Python lines that may run per character of an answer, and beside; see `count_lines`.
LINES_PER_CHAR, LINES_FLOOR = 400, 20_000


def count_lines(function: Callable[[], Any]) -> int:
    """How many lines of Python a call runs: the work of everything that is written in Python."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


# Each is repeated up to a length; several stopped earlier versions for minutes.
UNITS = {
    "tildes": "~",
    "backticks": "`",
    "blanks": " ",
    "fence and blanks": "``` ",
    "fences": "```\n",
    "python fences": "```python\n",
    "blocks that do not parse": "```python\ndef add(a, b):\n    return (\n```\n",
    "blocks that define it": "```python\ndef add(a, b):\n    return a\n```\n",
    "heads": "def add(a, b):\n",
    "functions and prose": "def add(a, b):\n    return a\nand then\n",
    "quotes": ">",
    "quote lines": "> \n",
    "list items": "- x\n",
    "empty items": "-\n",
    "items in items": "- - - - a\n",
    "lazy continuation": "> a\nb\n",
    "numbered": "1. a\n",
    "parentheses": "(",
    "minus signs": "-",
    "sums": "1+",
    "strings": '"""\n',
    "blocks of strings": '```python\n"""\n```\n',
    "block with an open string": '```python\nx = """\n``` \n',
    "quotes of both kinds": "'\"",
    "apostrophes": "'''",
    "docstrings with fences": '```python\ndef add(a, b):\n    """\n    ```\n    """\n    return a\n```\n',
    "returns": "\r",
    "tabs": "\t",
    "surrogates": "\ud800",
    "null bytes": "\0",
    "thoughts": "</think>",
}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("tail", ["", "`\n", "\nx y z\n"], ids=["plain", "backtick", "prose"])
def test_work_is_linear_in_the_answer(unit: str, tail: str) -> None:
    def read(chars: int) -> int:
        answer = (unit * chars)[:chars] + tail
        return count_lines(lambda: read_program(answer, ADD, "chat"))

    small, large = read(1500), read(3000)
    assert large <= 3000 * LINES_PER_CHAR
    assert large <= 2.5 * small + LINES_FLOOR


@settings(max_examples=60)
@given(st.lists(st.sampled_from([*UNITS.values(), "    ", "return a + b\n", "text "]), max_size=80).map("".join))
def test_work_is_bounded_for_any_mixture(answer: str) -> None:
    assert count_lines(lambda: read_program(answer, ADD, "chat")) <= len(answer) * LINES_PER_CHAR + LINES_FLOOR


@settings(max_examples=60)
@given(st.lists(st.sampled_from(list(UNITS.values())), max_size=60).map("".join))
def test_parser_is_handed_a_bounded_number_of_characters(answer: str) -> None:
    handed = 0

    def count(code: str, *_: Any, **__: Any) -> Any:
        nonlocal handed
        handed += len(code)
        return real(code)

    real = extract.ast.parse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract.ast, "parse", count)
        read_program(answer, ADD, "chat")
    # The program that comes out of it is parsed once more, and its prompt's header twice.
    assert handed <= make_budget(answer, ADD) + 2 * (len(answer) + 4 * len(ADD.prompt)) + 100


def test_spent_parser_parses_nothing() -> None:
    parser = Parser(5)
    assert parser.find_definitions("x = 1") != []
    assert parser.find_definitions("x") == []


def test_answer_beyond_the_limit_is_refused_by_its_length() -> None:
    with pytest.raises(ExtractionError, match=f"expected at most {MAX_ANSWER_CHARS} characters, got"):
        read_program("x" * (MAX_ANSWER_CHARS + 1), ADD, "chat")
    thoughts = "x" * (2 * MAX_ANSWER_CHARS) + "</think>def add(a, b):\n    return a + b\n"
    assert "return a + b" in read_program(thoughts, ADD, "chat")[0], "thoughts do not count"


def test_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Worker()
    assert one.read("def add(a, b):\n    return 1\n", ADD, "chat").defines
    one._process.kill()
    found = one.read("x", ADD, "chat")
    assert (found.program, found.defines) == ("", False)
    assert found.error.startswith("answer: expected code that can be read within")
    assert not one.alive
    worker._idle.put(one)
    assert read_safely("def add(a, b):\n    return 2\n", ADD, "chat").defines


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import time\ntime.sleep(999)", "while True: pass", "x = bytearray(1 << 40)"])
def test_reader_that_stalls_or_grows_is_ended(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    # In the place of a text that does this to CPython's parser, of which none is known in this version.
    stuck = "import laguna_serve.evals.extraction.worker as w\n"
    stuck += f"def read(*_):\n    exec({code!r})\nw.read_program = read\nw.serve()"
    monkeypatch.setattr(worker, "PYTHON", [sys.executable, "-P", "-c", stuck])
    monkeypatch.setattr(worker, "WALL_S", 1.0)
    monkeypatch.setattr(worker, "START_S", 2.0)
    one = Worker()
    found = one.read("x", ADD, "chat")
    assert found.error
    assert not found.defines
    one.close()


NASTY = {
    "deep parentheses": "def add(a, b):\n    return " + "(" * 5000 + "a" + ")" * 5000,
    "deep lists": "def add(a, b):\n    return " + "[" * 5000,
    "unary chain": "def add(a, b):\n    return " + "-" * 60_000 + "a",
    "sum chain": "def add(a, b):\n    return " + "a+" * 30_000 + "b",
    "attribute chain": "def add(a, b):\n    return a" + ".b" * 30_000,
    "huge literal": "def add(a, b):\n    return " + "9" * 60_000,
    "power": "def add(a, b):\n    return 9**9**9**9\n",
    "nested functions": "\n".join(" " * n + "def f():" for n in range(95)),
    "lambda chain": "add = " + "lambda: " * 8000 + "1",
    "comparison chain": "def add(a, b):\n    return " + "a<" * 20_000 + "b",
    "null byte": "def add(a, b):\n    return a + b\0",
    "surrogate": "def add(a, b):\n    return '\ud800'",
}


@pytest.mark.slow
@needs_walls
@pytest.mark.parametrize("code", NASTY.values(), ids=NASTY)
def test_program_that_hurts_a_parser_is_graded_all_the_same(code: str) -> None:
    verdict = grade_answer(ADD, f"```python\n{code}\n```", "chat", make_limits(cpu_s=4, wall_s=20))
    assert not verdict.grade.passed
    assert len(verdict.grade.detail) < 1000
    assert verdict.grade.detail.isprintable()


def test_nothing_parses_once_the_budget_is_spent() -> None:
    parser = Parser(12)
    assert [bool(parser.find_definitions("x = 1")) for _ in range(3)] == [True, True, False]
    assert parser.work == 15
