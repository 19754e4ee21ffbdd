"""Programs and answers that try to hang or crash whoever grades them: an end within limits, no pass, plain messages."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from cheat_matrix import read_sections
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import Grade, Verdict, grade, grade_answer
from laguna_serve.evals.problems import Problem

pytestmark = needs_walls

LIMITS = make_limits(cpu_s=1, wall_s=5)
# Its tests print, compare, copy, sort, hash and iterate what the program gives, and let themselves be called back.
TEST = """
import copy, itertools
def check(candidate):
    calls = []
    def callback(v):
        calls.append(1)
        return v(1, callback) if callable(v) and len(calls) < 10 ** 6 else v
    r = candidate([1], callback)
    assert f"{r!r} {r}" == "4 4"
    r = candidate([2], callback)
    assert r == 4 and r in [4] and r in {4: 1}
    assert copy.deepcopy(candidate([3], callback)) == 4
    assert sorted(candidate([4], callback)) == [4]
    assert list(itertools.islice(candidate([5], callback), 10 ** 7)) == [4]
    x = [6]
    for item in candidate(x, callback):
        assert item == x
    assert len(candidate([7], callback)) == 1
    assert candidate([8], callback) - 4 < 1e-6
"""
PROBLEM = Problem("T/hostile", "def f(x, g):\n    '''x'''\n", "f", TEST, None)
PROGRAMS = read_sections("hostile_programs.txt")

SQUARE = Problem("T/f", "def f(x):\n    '''x'''\n", "f", "def check(candidate):\n    assert candidate(3) == 9\n", None)
GOOD = "def f(x):\n    return x * x\n"


def fence(code: str) -> str:
    return f"Here:\n\n```python\n{code}\n```\n"


def before(code: str) -> str:
    return fence(f"{code}\n{GOOD}")


# Answers, and whether the program in them is right.
ANSWERS: dict[str, tuple[str, bool | None]] = {
    "a million fences": ("```\n" * 10**6, False),
    "15,000 fences": ("```\n" * 15_000, False),
    "fences of both kinds": ("~~~\n```\n" * 8000, False),
    "fences ever more indented": ("\n".join(" " * i + "```" for i in range(300)), False),
    "fences in nested lists": ("".join("  " * i + "- ```\n" for i in range(200)), False),
    "block quotes, 30,000 deep": (">" * 30_000 + fence(GOOD), True),
    "lists, 30,000 deep": ("- " * 30_000 + "x\n" + fence(GOOD), True),
    "carriage returns alone": (fence(GOOD).replace("\n", "\r"), True),
    "line ends mixed": ("text\r\n```python\r\ndef f(x):\n    return x * x\r\n```\n", True),
    "line separators": ("```python\ndef f(x):\u2028    return 0\n```\n" + fence(GOOD), True),
    "NULs in the prose": ("\x00\x00" + fence(GOOD), True),
    "NULs in the code": (before("x = '\x00'"), None),
    "surrogates in the prose": ("\ud800\udfff" + fence(GOOD), True),
    "surrogates in the code": (before("x = '\ud800'"), False),
    "terminal escapes": ("\x1b]0;t\x07\x1b[2J" + fence("raise ValueError('\x1b[31m\x1b]8;;x\x07')"), False),
    "direction marks": ("\u202e" + fence(GOOD), True),
    "30,000 parentheses": (before("x = " + "(" * 30_000 + ")" * 30_000), False),
    "60,000 signs": (before("x = " + "-" * 60_000 + "1"), False),
    "30,000 attributes": (before("x = a" + ".b" * 30_000), False),
    "30,000 calls": (before("x = a" + "()" * 30_000), False),
    "30,000 sums": (before("x = " + "+".join("1" * 30_000)), False),
    "20,000 texts in a row": (before("x = " + "'a'" * 20_000), True),
    "a power": (before("x = 9 ** 9 ** 9"), False),
    "a long text": (before("x = 'a' * 10 ** 12"), False),
    "a long shift": (before("x = 1 << 10 ** 12"), False),
    "60,000 digits": (before("x = " + "9" * 60_000), False),
    "formats in formats": (before("x = " + "f'{" * 100 + "1" + "}'" * 100), False),
    "120 blocks": (before("\n".join(" " * i + "if 1:" for i in range(120)) + "\n" + " " * 120 + "x = 1"), False),
    "15,000 decorators": (fence("d = lambda g: g\n" + "@d\n" * 15_000 + GOOD), True),
    "3,000 definitions": (fence("def f(x): pass\n" * 3000 + GOOD), True),
    "a text without end": (before("x = '''" + "a" * 50_000), False),
    "a codec's name": (before("# coding: utf-7"), True),
    "thinking, 4,000 times": ("<think></think>" * 4000 + fence(GOOD), True),
    "links and emphasis": ("[a](*_" * 8000 + "\n" + fence(GOOD), True),
    "a table": ("|a" * 10_000 + "\n" + "|-" * 10_000 + "\n" + fence(GOOD), True),
    "backticks": ("`" * 60_000 + "\n" + GOOD, True),
    "a long info string": ("```python " + "x" * 50_000 + "\n" + GOOD + "```", True),
    "25,000 comparisons": (before("x = " + "<".join("1" * 25_000)), None),
    "2,000 stars": (before("from math import *\n" * 2000), True),
    "nothing": ("", False),
    "blanks": (" " * 60_000, False),
}


def require_plain(text: str) -> None:
    assert len(text) < 1000
    assert text.isprintable()
    json.dumps(text).encode()
    text.encode()


@pytest.fixture(scope="module")
def programs() -> dict[str, Grade]:
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda program: grade(PROBLEM, program, LIMITS), PROGRAMS.values())
        return dict(zip(PROGRAMS, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_ends_and_does_not_pass(programs: dict[str, Grade], name: str) -> None:
    found = programs[name]
    assert not found.passed, found
    assert not found.published, found
    assert found.reward < 1
    assert found.status in ("failed", "broken", "died", "timeout", "unjudged"), found
    require_plain(found.detail)


@pytest.fixture(scope="module")
def answers() -> dict[str, Verdict]:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: grade_answer(SQUARE, case[0], "chat", LIMITS), ANSWERS.values())
        return dict(zip(ANSWERS, found, strict=True))


@pytest.mark.parametrize("name", ANSWERS)
def test_hostile_answer_is_read_for_what_it_holds(answers: dict[str, Verdict], name: str) -> None:
    found, right = answers[name].grade, ANSWERS[name][1]
    assert right is None or found.passed == right, found
    assert found.status in ("passed", "failed", "broken", "died", "timeout"), found
    require_plain(found.detail)
