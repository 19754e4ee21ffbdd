"""From a model's answer to its grade: the program is taken out of it, and run against the problem's tests.

Neither step can stop or crash the caller: answers are read by a worker process (extract_worker.py), programs run in the
sandbox, and both have limits of wall and processor time.
"""

from __future__ import annotations

from dataclasses import dataclass

from laguna_serve.evals.extract import Form
from laguna_serve.evals.extract_worker import read_safely
from laguna_serve.evals.grading import Grade, Limits, grade, refuse
from laguna_serve.evals.problems import Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth. `program`: what was graded; `extracted`: it parses and defines the function."""

    grade: Grade
    program: str
    extracted: bool


def grade_answer(problem: Problem, answer: str, form: Form, limits: Limits) -> Verdict:
    """Take the program out of an answer and run the tests on it. Blocking; for several threads at once.

    Raises:
        JailError: the sandbox could not be set up; says nothing about the answer.
    """
    found = read_safely(answer, problem, form)
    if found.error:
        return Verdict(refuse(problem, found.error, limits), "", False)
    return Verdict(grade(problem, found.program, limits), found.program, found.defines)
