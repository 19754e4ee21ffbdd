"""Wrong programs that published tests let pass do not pass strictly; right ones do, whatever they return."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from humaneval_like import PLUS, make_problem
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import Grade, find_baseline, grade
from laguna_serve.evals.codegen.weak_tests import find_weakness, tell_weaknesses
from laguna_serve.evals.problems import SHIPPED, Problem, load_problems
from laguna_serve.evals.sandbox import run_trial

pytestmark = needs_walls

LIMITS = make_limits(cpu_s=4, wall_s=30)
SQUARE = "def f(x):\n    return x * x\n"
SQUARES = "    return x * x\n"
PROMPT = "def f(x):\n    '''x'''\n"
CASES = json.loads(Path(__file__).with_name("verdict_cases.json").read_text())


def make(body: str, canonical: str | None) -> Problem:
    return make_problem(body, canonical=canonical, prompt=PROMPT)


@pytest.fixture(scope="module")
def fooled() -> dict[str, tuple[Grade, Grade | None]]:
    """Every case's grade of the wrong program and of the right one; several at once, as they mostly start processes."""

    def work(case: dict[str, str]) -> tuple[Grade, Grade | None]:
        problem = make(case["test"], case.get("canonical"))
        good = case.get("good")
        return grade(problem, case["wrong"], LIMITS), None if good is None else grade(problem, good, LIMITS)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CASES["fooled"], pool.map(work, CASES["fooled"].values()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES["fooled"])
def test_wrong_program_does_not_pass(fooled: dict[str, tuple[Grade, Grade | None]], name: str) -> None:
    wrong, good = fooled[name]
    assert not wrong.passed, wrong
    assert wrong.reward < 1
    assert wrong.status in ("failed", "weak", "unjudged", "broken", "died"), wrong
    assert good is None or good.passed, good


@pytest.fixture(scope="module")
def right() -> dict[str, tuple[Grade, int]]:
    """Every case's grade, and what plain execution in one process says."""

    def work(case: list[str]) -> tuple[Grade, int]:
        test, program = case
        body = "".join(f"    {line}\n" for line in test.split("\n"))
        command = [sys.executable, "-c", f"{program}\ndef check(candidate):\n{body}\ncheck(f)\n"]
        plain = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode
        return grade(make(test, None), program, LIMITS), plain

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CASES["right"], pool.map(work, CASES["right"].values()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES["right"])
def test_right_program_passes(right: dict[str, tuple[Grade, int]], name: str) -> None:
    found, plain = right[name]
    assert plain == 0, "the case itself"
    assert found.passed, found


@pytest.mark.parametrize("name", CASES["unjudged"])
def test_what_cannot_cross_is_said_to_be_unjudged(name: str) -> None:
    test, program = CASES["unjudged"][name]
    found = grade(make(test, None), program, LIMITS)
    assert (found.status, found.passed, found.reward < 1) == ("unjudged", False, True), found
    assert "cannot be judged" in found.detail


def test_special_methods_of_a_classs_own_class_are_not_its_instances() -> None:
    """Enum's metaclass has a `__bool__` and a `__len__`, which say nothing of its members."""
    program = "import enum\nclass C(enum.Enum):\n    RED = 'r'\ndef f(x):\n    return C.RED\n"
    found = grade(make("assert candidate(1)\nassert not hasattr(candidate(1), '__len__')", None), program, LIMITS)
    assert (found.published, found.tests_passed) == (True, 2), found


def test_packages_and_memory_are_let_in_by_name() -> None:
    numpy = make("assert candidate([1, 2]) == 3", None)
    program = "import numpy as np\ndef f(x):\n    return np.sum(np.array(x))\n"
    assert "(--packages)" in grade(numpy, program, LIMITS).detail
    assert grade(numpy, program, replace(LIMITS, packages=("numpy",), memory_bytes=2 << 30)).passed
    memory = make("assert candidate(1) == 1", None)
    program = "def f(x):\n    a = bytearray(600 << 20)\n    return 1\n"
    assert not grade(memory, program, LIMITS).passed
    assert grade(memory, program, replace(LIMITS, memory_bytes=1 << 30)).passed


def test_two_verdicts_stand_beside_each_other() -> None:
    found = grade(PLUS, "def total(numbers):\n    return []\n", LIMITS)
    assert (found.published, found.passed, found.status) == (True, False, "weak")
    assert "expected a number, as the canonical solution gives, got a collection of 0" in found.detail
    with_floats = grade(PLUS, "def total(numbers):\n    return sum(numbers)\n", LIMITS)
    assert with_floats.passed, "an int for a float is what the test takes"


def test_problem_whose_solution_fails_is_at_fault() -> None:
    problem = make("assert candidate(2) == 5", SQUARES)
    found = grade(problem, "def f(x):\n    return 5\n", LIMITS)
    assert (found.status, found.passed, found.published, found.reward) == ("fault", False, True, 0.0)
    assert "the canonical solution does not pass" in found.detail
    broken = replace(problem, test="import nowhere_at_all\ndef check(candidate):\n    assert candidate(2) == 4\n")
    assert grade(broken, SQUARE, LIMITS).status == "fault"


def test_canonical_run_that_ran_out_of_time_is_not_kept() -> None:
    slow = make("assert candidate(2) == 4", "    import time\n    time.sleep(99)\n")
    hurried = make_limits(cpu_s=1, wall_s=0.5)
    assert "timeout" in find_baseline(slow, hurried).fault
    assert (slow, hurried) not in _kept()


def _kept() -> object:
    from laguna_serve.evals.codegen import grading

    return grading._baselines


def test_open_ended_answers_may_be_of_another_length() -> None:
    problem = make("assert sum(candidate(6)) == 6", "    return [1, 2, 3]\n")
    other = "def f(x):\n    return [2, 4]\n"
    assert not grade(problem, other, LIMITS).passed
    assert grade(replace(problem, open_ended=True), other, LIMITS).passed
    assert not grade(replace(problem, open_ended=True), "def f(x):\n    return 6\n", LIMITS).passed


def test_universal_wrong_answers_are_named() -> None:
    found = [find_weakness(problem, LIMITS) for problem in (PLUS, make("assert candidate(2)", None))]
    assert "return []" in found[0].published
    assert found[0].strict == ()
    assert {"return True", "return 1", "return 'a'"} <= set(found[1].strict)
    lines = tell_weaknesses(found)
    assert lines[0] == "universal wrong answers pass 2 of 2 problems as published, 1 strictly"
    assert "even strictly by" in lines[2]


@pytest.mark.slow
def test_shipped_problems_can_be_passed_by_no_universal_answer() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda problem: find_weakness(problem, LIMITS), load_problems(SHIPPED)))
    assert [item for item in found if item.published or item.strict or item.fault] == []


REACHING = {
    "frames of a generator": "def f(g):\n    return g.gi_frame\n",
    "globals of a function": "def f(g):\n    return g.__globals__\n",
    "class of an instance": "def f(n):\n    return n.__class__.__init__.__globals__\n",
    "module by a method": "def f(n):\n    return n.get.__func__\n",
    "an operation that is none": (
        "from laguna_serve.evals.sandbox.messages.proxies import operate\n"
        "def f(n):\n    return operate(n, 'global', 'check')\n"
    ),
}


@pytest.mark.parametrize("program", REACHING.values(), ids=REACHING)
def test_insides_of_the_tests_are_out_of_reach(program: str) -> None:
    body = "class N:\n    def get(self):\n        return 1\n"
    for given in ("(i for i in range(3))", "N()", "lambda: 1"):
        problem = make(f"{body}raise RuntimeError('got ' + repr(candidate({given})))", None)
        found = grade(problem, program, LIMITS)
        assert "RuntimeError: got" not in found.detail, found


@pytest.mark.slow
def test_grader_is_bounded() -> None:
    problem = make("assert len(list(candidate(1))) == 1", None)
    for value in ("range(95_000_000)", "__import__('itertools').count()"):
        found = grade(problem, f"def f(x):\n    return {value}\n", make_limits(cpu_s=4, wall_s=4))
        assert not found.passed
    trial = run_trial(problem, "def f(x):\n    return range(95_000_000)\n", LIMITS)
    assert (trial.unjudged, trial.failed) == (1, 0)
