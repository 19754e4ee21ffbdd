"""Code problems: a model is asked (runner.py), its programs are graded (grading.py), and counted (report.py).

What stands below is for callers outside of this repository's evaluations, as evals/spec_rl: problems and their split,
the question, the grade of an answer or of a program, and the sandbox's limits and walls.
"""

from laguna_serve.evals.codegen.grading import Grade, Verdict, grade, grade_answer
from laguna_serve.evals.problems.problem import Form, Kind, Problem, ProblemsError
from laguna_serve.evals.problems.protocols import make_prompt
from laguna_serve.evals.problems.reading import SHIPPED, load_problems
from laguna_serve.evals.problems.splits import HELD_OUT_SHARE, is_held_out, split_problems
from laguna_serve.evals.sandbox import JailError, Limits, Wanted, choose_walls

__all__ = [
    "HELD_OUT_SHARE",
    "SHIPPED",
    "Form",
    "Grade",
    "JailError",
    "Kind",
    "Limits",
    "Problem",
    "ProblemsError",
    "Verdict",
    "Wanted",
    "choose_walls",
    "grade",
    "grade_answer",
    "is_held_out",
    "load_problems",
    "make_prompt",
    "split_problems",
]
