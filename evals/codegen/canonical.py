"""Do the problems' own solutions pass their tests here? What a set's figures rest on, before any model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.evals.codegen.grading import Grade, Limits, Verdict, grade
from laguna_serve.evals.codegen.printable import make_printable
from laguna_serve.evals.codegen.result import ProblemsFile
from laguna_serve.evals.codegen.samples import GradeLine
from laguna_serve.evals.codegen.weak_tests import Weakness
from laguna_serve.evals.problems.problem import Problem
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.journal import KeyedJournal
from laguna_serve.serving.machine.cores import count_cores

SOLUTIONS = "solutions.jsonl"


class Failing(Struct, frozen=True, kw_only=True):
    """A solution that does not pass; without one there is no `published`."""

    task_id: str
    status: str
    published: bool | UnsetType = UNSET
    detail: str


class CanonicalResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.code_canonical/1"):
    """canonical.json. `tests_of`: how many tests each solution passed; `weak`: what universal wrong answers pass."""

    walls: str | None = None
    file: ProblemsFile
    protocol: str
    limits: Limits
    problems: int
    passing: int
    tests: int
    failing: list[Failing]
    tests_of: dict[str, int]
    weak: list[Weakness]
    environment: Environment


@dataclass(frozen=True, slots=True)
class Checked:
    """A problem's solution: its grade, or None where the file has no solution."""

    problem: Problem
    grade: Grade | None

    @property
    def passes(self) -> bool:
        """Say whether the solution passes in the strict sense."""
        return self.grade is not None and self.grade.passed


def check_solutions(
    problems: Sequence[Problem], limits: Limits, folder: Path | None, report: Callable[[int, int], None]
) -> list[Checked]:
    """Grade every solution, in the problems' order.

    `report` gets (done, total) after each. In a folder the grades are kept as they come, and what is there is not
    graded again.

    Raises:
        JailError: the sandbox could not be set up.
        JournalError, OSError: the folder's file cannot be read or written.
    """
    log = KeyedJournal(folder / SOLUTIONS, GradeLine, lambda line: line.key) if folder is not None else None
    checked: list[Checked] = []

    def check(problem: Problem) -> Checked:
        kept = log.by_key.get((problem.task_id, 0)) if log is not None else None
        return Checked(problem, _grade(problem, limits) if kept is None else kept.grade)

    pool = ThreadPoolExecutor(count_cores())
    try:
        for one in pool.map(check, problems):
            checked.append(one)
            key = (one.problem.task_id, 0)
            if log is not None and one.grade is not None and key not in log.by_key:
                log.add(GradeLine.of(key, Verdict(one.grade, "", True)))
            report(len(checked), len(problems))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return checked


def _grade(problem: Problem, limits: Limits) -> Grade | None:
    solution = problem.canonical_solution
    return None if solution is None else grade(problem, problem.prompt + solution, limits)


def list_failing(checked: Sequence[Checked]) -> list[Failing]:
    """List the solutions that do not pass, with their reasons."""
    return [_describe(one) for one in checked if not one.passes]


def count_tests(checked: Sequence[Checked]) -> dict[str, int]:
    """How many tests each solution passed, by task id."""
    return {one.problem.task_id: one.grade.tests_total for one in checked if one.grade is not None}


def render_solutions(result: CanonicalResult) -> str:
    """Render a line for each solution that does not pass, then the counts."""
    lines = [f"{make_printable(row.task_id)}: {row.status}: {row.detail}" for row in result.failing]
    return "\n".join([*lines, f"{result.passing} of {result.problems} canonical solutions pass; {result.tests} tests"])


def _describe(checked: Checked) -> Failing:
    name, verdict = checked.problem.task_id, checked.grade
    if verdict is None:
        return Failing(task_id=name, status="missing", detail="no canonical_solution")
    return Failing(task_id=name, status=verdict.status, published=verdict.published, detail=verdict.detail)
