"""Verdicts: HumanEval's and HumanEval+'s forms of test, the share of tests, and programs that try to fake success."""

from __future__ import annotations

import pytest
from humaneval_like import ADD, DECODE, PLUS, make_problem
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import Grade, grade
from laguna_serve.evals.problems import Problem

pytestmark = needs_walls
LIMITS = make_limits()


def solve(problem: Problem) -> Grade:
    assert problem.canonical_solution is not None
    return grade(problem, problem.prompt + problem.canonical_solution, LIMITS)


@pytest.mark.parametrize(("problem", "tests"), [(ADD, 6), (DECODE, 20), (PLUS, 4)], ids=["add", "decode", "plus"])
def test_canonical_solution_passes(problem: Problem, tests: int) -> None:
    assert solve(problem) == Grade(1.0, True, tests, tests, "passed", "", published=True)


def test_share_counts_the_tests_in_loops_and_helpers() -> None:
    found = grade(ADD, "def add(a, b):\n    return a * b\n", LIMITS)
    assert (found.tests_passed, found.tests_total, found.passed, found.status) == (2, 6, False, "failed")
    assert found.reward == pytest.approx(2 / 6)
    assert found.detail.startswith("test line 5, assert candidate(1, 2) == 3, 'first': AssertionError")
    found = grade(PLUS, "def total(numbers):\n    return 1.0 * max(numbers)\n", LIMITS)  # raises on the empty list
    assert (found.tests_passed, found.tests_total) == (1, 4)


def test_what_was_not_reached_has_not_passed() -> None:
    body = "assert candidate(0) == 0\nout = candidate(1)\nassert out == 1\n"
    body += "for i in range(8):\n    assert candidate(i) == i"
    problem = make_problem(body, canonical="def f(x):\n    return x\n")
    found = grade(problem, "def f(x):\n    if x == 1:\n        raise KeyError('no')\n    return x\n", LIMITS)
    assert (found.tests_passed, found.tests_total) == (1, 10)
    assert found.detail == "test line 3, out = candidate(1): KeyError: 'no'"
    found = grade(problem, "def f(x):\n    if x == 4:\n        import os\n        os._exit(0)\n    return x\n", LIMITS)
    assert (found.tests_passed, found.tests_total, found.status) == (6, 10, "died")
    assert grade(problem, "x = 1", LIMITS).reward == 0.0


def test_iteration_that_raises_does_not_end_the_loop() -> None:
    body = "for i in range(10):\n    out = candidate(i)\n    assert out == i"
    problem = make_problem(body, canonical="def f(x):\n    return x\n")
    found = grade(problem, "def f(x):\n    return x if x != 3 else 1 // 0\n", LIMITS)
    assert (found.tests_passed, found.tests_total) == (9, 10)


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        (
            "try:\n    candidate(-1)\n    assert False, 'no error'\nexcept ValueError:\n    pass",
            "def f(x):\n    raise ValueError('negative')\n",
            "def f(x):\n    raise KeyError('negative')\n",
        ),
        (
            "import unittest\nwith unittest.TestCase().assertRaisesRegex(ZeroDivisionError, 'zero'):\n    candidate(0)",
            "def f(x):\n    return 1 // x\n",
            "def f(x):\n    raise SystemExit(0)\n",
        ),
        (
            "import unittest\nunittest.TestCase().assertAlmostEqual(candidate(1.0), float('inf'))",
            "def f(x):\n    return float('inf')\n",
            "def f(x):\n    return float('nan')\n",
        ),
        (
            "items = [3, [2, 1], {'a': [1]}]\nassert candidate(items) is None\n"
            "assert items == [3, [2, 1, 0], {'a': [1], 'b': 2}, 'end']",
            "def f(x):\n    x[1].append(0)\n    x[2]['b'] = 2\n    x.append('end')\n",
            "def f(x):\n    return None\n",
        ),
        (
            "seen = []\nassert list(candidate(lambda x: seen.append(x) or x * 2, iter([1, 2]))) == [2, 4]\n"
            "assert seen == [1, 2]",
            "def f(g, xs):\n    return map(g, xs)\n",
            "def f(g, xs):\n    return [2, 4]\n",
        ),
        (
            "g = candidate()\nassert [next(g) for _ in range(4)] == [0, 1, 4, 9]",
            "import itertools\ndef f():\n    return (i * i for i in itertools.count())\n",
            "def f():\n    return iter([0, 1, 4])\n",
        ),
        (
            "assert candidate(3)(4) == 7\nassert candidate(n=1)(1) == 2",
            "def f(n):\n    return lambda x: x + n\n",
            "def f(n):\n    return lambda x: x * n\n",
        ),
        (
            "same = (1, 2.5, True, None, 'é\\ud800', b'\\xff', bytearray(b'a'), 1j, {1, 2}, frozenset({3}), range(3),"
            " {(1, 2): [None]}, 10 ** 4000, -0.0, int)\nassert repr(candidate(same)) == repr(same)",
            "def f(x):\n    return x\n",
            "def f(x):\n    return list(x)\n",
        ),
        (
            "assert candidate([1, 'a', 2]) == {1: 1, 'a': 1, 2: 1}",
            "from collections import Counter\ndef f(x):\n    return Counter(x)\n",
            "from collections import Counter\ndef f(x):\n    return Counter()\n",
        ),
    ],
    ids=["try", "raises", "assert call", "mutation", "callable", "generator", "closure", "values", "subclass"],
)
def test_kinds_of_test_and_value(body: str, good: str, bad: str) -> None:
    problem = make_problem(body)
    assert grade(problem, good, LIMITS).passed, grade(problem, good, LIMITS)
    assert not grade(problem, bad, LIMITS).passed


def test_value_without_a_form_is_unjudged_whatever_the_test_catches() -> None:
    problem = make_problem("try:\n    assert candidate() == 1\nexcept Exception:\n    pass")
    found = grade(problem, "import sys\n\ndef f():\n    return [sys]\n", LIMITS)
    assert (found.passed, found.status) == (False, "unjudged")
    assert "got one of type module" in found.detail


def test_prompt_and_program_that_do_not_compile_or_define() -> None:
    assert grade(ADD, "def add(a, b:\n", LIMITS).status == "broken"
    assert (
        grade(ADD, "def plus(a, b):\n    return a + b\n", LIMITS).detail
        == "NameError: expected a function add, got none"
    )
    assert "line 2" in grade(ADD, "import math\nraise ValueError('x')\n", LIMITS).detail


def test_program_sees_the_seed_of_hashes_and_not_its_own_main() -> None:
    program = "if __name__ == '__main__':\n    raise SystemExit\ndef f():\n    return list({'a', 'b', 'c', 'd'})\n"
    problem = make_problem(
        "import sys\nassert sys.flags.hash_randomization == 0\nassert candidate() == list({*'abcd'})"
    )
    assert grade(problem, program, LIMITS).passed


WRONG = """
def add(a, b):
    return 0
"""
FAKES = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "exit in the call": "def add(a, b): raise SystemExit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "exit at exit": f"import atexit, os; atexit.register(os._exit, 0){WRONG}",
    "success on every descriptor": f"""
import os
for fd in range(64):
    try:
        os.write(fd, b'++++++{{"ending": "ended", "detail": ""}}')
    except OSError:
        pass
{WRONG}""",
    "success as a message": f"""
import json, os
for message in (["ready", ""], ["ended", ""]):
    data = json.dumps(message).encode()
    for fd in range(3, 64):
        try:
            os.write(fd, len(data).to_bytes(4, "big") + data)
        except OSError:
            pass
{WRONG}""",
    "printed success": f"print('PASSED'); print('ok'){WRONG}",
    "no AssertionError": f"import builtins; builtins.AssertionError = SystemExit{WRONG}",
    "check replaced": f"""
import builtins, sys
for module in [builtins, *sys.modules.values()]:
    module.check = lambda candidate: None
{WRONG}""",
    "comparison replaced": """
class Yes(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
def add(a, b):
    return Yes(0)
""",
    "object that equals all": """
class Yes:
    __eq__ = lambda self, other: True
    def __repr__(self):
        raise SystemExit(0)
def add(a, b):
    return Yes()
""",
    "modules replaced": f"""
import sys, types
for name in ("unittest", "numpy", "random", "math"):
    sys.modules[name] = types.ModuleType(name)
{WRONG}""",
    "expected values from frames and objects": """
import gc, sys
def word():  # of the tests; not to be found in this program itself
    return "ATADATEM"[::-1]
def add(a, b):
    frame = sys._getframe()
    while frame:
        if any(word() in str(value) for value in [*frame.f_locals.values(), *frame.f_globals.values()]):
            return a + b
        frame = frame.f_back
    texts = [text for o in gc.get_objects() if type(o) is dict for text in o.values() if type(text) is str]
    return a + b if any(word() in text for text in texts) else 0
""",
    "tests from files": """
import os
names = {name for _, _, names in os.walk("/") for name in names}
def add(a, b):
    return a + b if names & {"original.jsonl", "grading.py", "shadow", "passwd"} else 0
""",
    "installed packages": """
import importlib.util
def add(a, b):
    return a + b if importlib.util.find_spec("numpy") or importlib.util.find_spec("pip") else 0
""",
    "thread that takes over the pipe": f"""
import os, threading
def work():
    while True:
        for fd in range(3, 10):
            try:
                os.write(fd, b'\\x00\\x00\\x00\\x0e["done",3,[0,0]]')
            except OSError:
                pass
threading.Thread(target=work, daemon=True).start()
{WRONG}""",
    "own wire replaced": f"""
import json
from laguna_serve.evals.sandbox.messages import proxies
proxies.describe_exception = None
json.dumps = lambda *args, **named: '["done", true, []]'
{WRONG}""",
    "exception that lies about itself": """
class Lie(Exception):
    def __str__(self):
        import os
        os._exit(0)
    args = property(__str__)
def add(a, b):
    raise Lie
""",
}


@pytest.mark.parametrize("program", FAKES.values(), ids=FAKES)
def test_success_cannot_be_faked(program: str) -> None:
    found = grade(ADD, program, make_limits(cpu_s=4, wall_s=8))
    assert not found.passed
    # 0 + 0 and −5 + 5 are 0: a program that answers 0 has those two right.
    assert found.tests_passed <= 2
    assert found.tests_total == 6


HANGS = {
    "endless loop": "def add(a, b):\n    while True: pass",
    "endless sleep": "import time\ndef add(a, b): time.sleep(1000)",
    "loop on load, signals ignored": """
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", HANGS.values(), ids=HANGS)
def test_program_that_hangs_runs_out_of_time(program: str) -> None:
    assert grade(ADD, program, make_limits(cpu_s=1, wall_s=2)).status == "timeout"
