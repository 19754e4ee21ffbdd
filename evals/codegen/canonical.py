"""Do the problems' own solutions pass their tests here? What a set's figures rest on, before any model is asked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.evals.codegen.grading import Grade, Limits, grade
from laguna_serve.evals.codegen.samples import SampleLog
from laguna_serve.evals.problems.problem import Problem

SOLUTIONS = "solutions.jsonl"


@dataclass(frozen=True, slots=True)
class Checked:
    """A problem's solution: its grade, or None where the file has no solution."""

    problem: Problem
    grade: Grade | None

    @property
    def passes(self) -> bool:
        """In the strict sense."""
        return self.grade is not None and self.grade.passed


def check_solutions(
    problems: Sequence[Problem], limits: Limits, folder: Path | None, report: Callable[[int, int], None]
) -> list[Checked]:
    """Grade every solution, in the problems' order. `report` is told (done, total) after each. In a folder the grades
    are kept as they come, and what is there is not graded again.

    Raises:
        JailError: the sandbox could not be set up.
        OSError: the folder cannot be written.
    """
    found: list[Checked] = []
    with ExitStack() as stack:
        log = SampleLog(folder / SOLUTIONS) if folder is not None else None
        if log is not None:
            stack.callback(log.close)

        def check(problem: Problem) -> Checked:
            kept = log.entries.get((problem.task_id, 0)) if log is not None else None
            return Checked(problem, Grade(**kept) if kept is not None else _grade(problem, limits))

        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0))))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for checked in pool.map(check, problems):
            found.append(checked)
            name, verdict = checked.problem.task_id, checked.grade
            if log is not None and verdict is not None and (name, 0) not in log.entries:
                log.add((name, 0), asdict(verdict))
            report(len(found), len(problems))
    return found


def _grade(problem: Problem, limits: Limits) -> Grade | None:
    solution = problem.canonical_solution
    return None if solution is None else grade(problem, problem.prompt + solution, limits)


def summarise_solutions(found: Sequence[Checked]) -> dict[str, Any]:
    """Counts, the failing ones with their reasons, and how many tests each of the others passed."""
    tests = {each.problem.task_id: each.grade.tests_total for each in found if each.grade is not None}
    return {
        "problems": len(found),
        "passing": sum(each.passes for each in found),
        "tests": sum(tests.values()),
        "failing": [_describe(each) for each in found if not each.passes],
        "tests_of": tests,
    }


def _describe(checked: Checked) -> dict[str, Any]:
    name, verdict = checked.problem.task_id, checked.grade
    if verdict is None:
        return {"task_id": name, "status": "missing", "detail": "no canonical_solution"}
    return {"task_id": name, "status": verdict.status, "published": verdict.published, "detail": verdict.detail}


def describe_file(path: Path) -> dict[str, Any]:
    """A problems file by its name and what is in it, wherever it lies."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
