"""The problems that ship with the project: solvable, true to their docstrings, and with tests that catch mistakes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.problems import SHIPPED, Problem, load_problems

PROBE = Path(__file__).with_name("mutation_probe.py")
CAUGHT_AT_LEAST = 0.8
PROBLEMS = load_problems(SHIPPED)


@pytest.fixture(scope="module")
def probed() -> dict[str, dict[str, Any]]:
    """What mutation_probe.py found, by task id."""
    command = [sys.executable, str(PROBE), str(SHIPPED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task_id"] for row in rows] == [problem.task_id for problem in PROBLEMS]
    return {row["task_id"]: row for row in rows}


def test_file_is_complete_and_in_humanevals_form() -> None:
    assert len(PROBLEMS) >= 48
    assert [problem.task_id for problem in PROBLEMS] == [f"Laguna/{number}" for number in range(len(PROBLEMS))]
    assert len({problem.entry_point for problem in PROBLEMS}) == len(PROBLEMS)
    levels = [json.loads(line)["difficulty"] for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    assert levels == sorted(levels, key=["easy", "medium", "hard"].index)
    assert min(levels.count(level) for level in ("easy", "medium", "hard")) >= 14


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.entry_point)
def test_prompt_ends_in_a_docstring_and_calls_are_asserted(problem: Problem) -> None:
    assert problem.prompt.endswith('"""\n')
    assert problem.canonical_solution is not None
    assert all(line.startswith("    ") for line in problem.canonical_solution.splitlines() if line)
    (check,) = ast.parse(problem.test).body
    assert isinstance(check, ast.FunctionDef)
    # A call outside of an assert that raises would end the check, and hide the tests behind it from the dense reward.
    loose = [node for node in check.body if not isinstance(node, ast.Assert | ast.FunctionDef)]
    assert "candidate" not in {node.id for part in loose for node in ast.walk(part) if isinstance(node, ast.Name)}
    assert 6 <= sum(isinstance(node, ast.Assert) for node in check.body) <= 18


@pytest.mark.slow
@needs_walls
def test_canonical_solutions_pass_in_the_sandbox() -> None:
    with ThreadPoolExecutor(2) as pool:
        programs = [problem.prompt + str(problem.canonical_solution) for problem in PROBLEMS]
        grades = pool.map(grade, PROBLEMS, programs, repeat(make_limits()))
    assert [(p.task_id, g.status, g.detail) for p, g in zip(PROBLEMS, grades, strict=True) if not g.passed] == []


@pytest.mark.slow
def test_examples_in_docstrings_are_true(probed: dict[str, dict[str, Any]]) -> None:
    assert [name for name, row in probed.items() if not row["examples"]] == []
    assert [name for name, row in probed.items() if row["false_examples"]] == []


@pytest.mark.slow
def test_doing_nothing_fails(probed: dict[str, dict[str, Any]]) -> None:
    assert [name for name, row in probed.items() if (row["canonical"], row["empty"]) != ("passed", "failed")] == []


@pytest.mark.slow
def test_small_mistakes_are_caught(probed: dict[str, dict[str, Any]]) -> None:
    for name, row in probed.items():
        caught = row["ended"] - len(row["passed"])
        assert caught >= 2, name
        missed = "\n\n".join(row["passed"])
        assert caught >= CAUGHT_AT_LEAST * row["ended"], f"{name}: {caught} of {row['ended']}; missed:\n\n{missed}"
