"""Programs that compute nothing do not pass, under tests of any form; idiomatic right ones do."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from cheat_matrix import PROMPT, Pair, grade_pairs, list_pairs, make_problem, read_sections, split_fields
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import Grade, grade

pytestmark = [needs_walls, pytest.mark.slow]

# Of all pairs of a program and a form; cheat_matrix.py tries all of them.
EVERY = 9
LIMITS = make_limits(cpu_s=4, wall_s=30)
RIGHT = {name: split_fields(text) for name, text in read_sections("right_programs.txt").items()}
PLAIN = """
import sys, types
module = sys.modules["solution"] = types.ModuleType("solution")
exec(compile(sys.argv[1], "solution", "exec"), module.__dict__)
"""


@pytest.fixture(scope="module")
def cheated() -> dict[Pair, Grade]:
    return grade_pairs(list_pairs(EVERY))


@pytest.mark.parametrize("form", dict.fromkeys(form for form, _ in list_pairs(EVERY)))
def test_program_that_computes_nothing_does_not_pass(cheated: dict[Pair, Grade], form: str) -> None:
    passed = {pair: found for pair, found in cheated.items() if pair[0] == form and (found.passed or found.reward == 1)}
    assert not passed


@pytest.fixture(scope="module")
def judged() -> dict[str, tuple[Grade, Grade, str]]:
    """Each program's grade beside a canonical solution of another style, and without one.

    Plus what plain execution says of both.
    """

    def work(parts: dict[str, str]) -> tuple[Grade, Grade, str]:
        problem = make_problem(parts["test"], parts["canonical"])
        said = ""
        for program in (parts["program"], PROMPT + parts["canonical"]):
            text = f"{program}\n{problem.test}\ncheck(f)\n"
            command = [sys.executable, "-c", PLAIN, text]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            said += done.stderr if done.returncode else ""
        alone = make_problem(parts["test"], None)
        return grade(problem, parts["program"], LIMITS), grade(alone, parts["program"], LIMITS), said

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RIGHT, pool.map(work, RIGHT.values()), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_right_program_passes(judged: dict[str, tuple[Grade, Grade, str]], name: str) -> None:
    beside, alone, plain = judged[name]
    assert not plain, "the case itself"
    assert beside.passed, beside
    assert alone.passed, alone
