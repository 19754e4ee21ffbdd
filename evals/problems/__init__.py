"""Code problems, whatever file they come from: read (reading.py, a module per form), and asked (protocols.py)."""

from laguna_serve.evals.problems.problem import Kind, Problem, ProblemsError
from laguna_serve.evals.problems.reading import SHIPPED, find_form, load_problems, read_rows

__all__ = ["SHIPPED", "Kind", "Problem", "ProblemsError", "find_form", "load_problems", "read_rows"]
