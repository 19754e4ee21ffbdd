"""From a model's answer to its grade: the program is taken out of it, and run against the problem's tests.

Neither step can stop or crash the caller: answers are read by a worker process (extraction/worker.py), programs run in
the sandbox, and both have limits of wall and processor time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from laguna_serve.evals.codegen.grading import Grade, Limits, grade, refuse
from laguna_serve.evals.extraction.worker import read_safely
from laguna_serve.evals.problems.problem import Form, Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth. `program`: what was graded; `extracted`: it parses and defines the function; `base`: of
    a problem with base tests, whether it passes those, as published."""

    grade: Grade
    program: str
    extracted: bool
    base: bool | None = None


def grade_answer(problem: Problem, answer: str, form: Form, limits: Limits) -> Verdict:
    """Take the program out of an answer and run the tests on it. Blocking; for several threads at once.

    Raises:
        JailError: the sandbox could not be set up; says nothing about the answer.
    """
    found = read_safely(answer, problem, form)
    if found.error:
        return Verdict(refuse(problem, found.error, limits), "", False, False if problem.base_test else None)
    graded = grade(problem, found.program, limits)
    if problem.kind == "value" and graded.passed and not found.defines:
        detail = "expected a value that is written out, got an expression that computes it"
        graded = replace(graded, reward=0.0, passed=False, status="weak", detail=detail)
    return Verdict(graded, found.program, found.defines, grade_base(problem, found.program, graded, limits))


def grade_base(problem: Problem, program: str, graded: Grade, limits: Limits) -> bool | None:
    """Does a program pass the base tests, as published? None of a problem without; what passes all passes these.

    Raises:
        JailError: see `grade_answer`.
    """
    if not problem.base_test:
        return None
    return graded.published or grade(replace(problem, test=problem.base_test, base_test=""), program, limits).published
