"""CRUXEval-O: the value that a function gives (Gu et al. 2024, arXiv:2401.03065).

A row has the code of `f`, an input and the output. A model gives the output; what it gives is evaluated in the jail
without `f` at hand, and `assert f(input) == output` is what the grader then runs. The prompts are of the paper's kind
(its tags, one worked example with its steps, two without) in words and examples of this project: a published prompt
can be put beside the data (suites.py).
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from laguna_serve.evals.problems.problem import Problem, ProblemsError
from laguna_serve.serving.kit.results import JsonObject

# The name under which the grader asks for the value.
ENTRY_POINT = "predict_output"
CALL_BEFORE, CALL_BEHIND = "def check(candidate):\n    assert f(", ") == candidate()\n"
ANSWER, END = "[ANSWER]", "[/ANSWER]"
TASK = """\
Below are a Python function and an assertion about one call of it. Give the value that stands for ?? when the call is \
run as it is written, mistakes of the function included. It must be a literal: no operators, no calls. """
COT = (
    TASK
    + """\
Go through the call step by step between [THOUGHT] and [/THOUGHT], then write the whole assertion between [ANSWER] and \
[/ANSWER].

[PYTHON]
def f(words):
    words = words[1:]
    return "-".join(words) + "!"
assert f(["a", "b", "c"]) == ??
[/PYTHON]
[THOUGHT]
words is ["a", "b", "c"] at first. The slice drops the first item: words is ["b", "c"]. Joined with "-" that is "b-c". \
An exclamation mark is added: "b-c!".
[/THOUGHT]
[ANSWER]
assert f(["a", "b", "c"]) == "b-c!"
[/ANSWER]

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]
[THOUGHT]
"""
)
DIRECT = (
    TASK
    + """\
Write the whole assertion between [ANSWER] and [/ANSWER], and nothing else.

[PYTHON]
def f(count):
    return [count, count + 1]
assert f(4) == ??
[/PYTHON]
[ANSWER]
assert f(4) == [4, 5]
[/ANSWER]

[PYTHON]
def f(text):
    return text.upper()
assert f("ab1") == ??
[/PYTHON]
[ANSWER]
assert f("ab1") == "AB1"
[/ANSWER]

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]
[ANSWER]
"""
)


def read_cruxeval(where: str, row: JsonObject, protocol: str) -> Problem:
    """Read a row of cruxeval.jsonl.

    Raises:
        ProblemsError: a field is missing, or the code defines no `f`, or input and output are no expressions.
    """
    try:
        code, given, output, name = (str(row[field]) for field in ("code", "input", "output", "id"))
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        if "f" not in defined:
            raise ValueError("code without f")
        ast.parse(f"f({given})", mode="eval")
        ast.parse(output, mode="eval")
    except (KeyError, SyntaxError, ValueError, RecursionError) as error:
        expected = "expected CRUXEval's code (of f), input, output and id"
        raise ProblemsError(f"{where}: {expected}, got {type(error).__name__}: {error}; fetch the set again") from None
    asked = fill_prompt(COT if protocol == "cot" else DIRECT, code, given)
    return Problem(
        task_id=f"CRUXEval/{name}",
        prompt=code.rstrip() + "\n",
        entry_point=ENTRY_POINT,
        test=f"{CALL_BEFORE}{given}{CALL_BEHIND}",
        canonical_solution=f"\n\ndef {ENTRY_POINT}():\n    return {output.strip()}\n",
        asked=asked,
        message=asked,
        stops=(END,),
        kind="value",
    )


def fill_asked(problems: Sequence[Problem], path: Path) -> list[Problem]:
    """Give the problems another prompt, from a file with {code} and {input} in it.

    Raises:
        ProblemsError: the file cannot be read or lacks them, or the problems are not CRUXEval's.
    """
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemsError(f"{path}: expected a prompt, got {error}; check --prompt-file") from None
    if "{code}" not in template or "{input}" not in template:
        raise ProblemsError(f"{path}: expected a prompt with {{code}} and {{input}} in it, got one without; add them")
    if any(problem.kind != "value" for problem in problems):
        raise ProblemsError("--prompt-file: expected CRUXEval's problems with it, got others; leave it out")
    found = []
    for problem in problems:
        given = problem.test.removeprefix(CALL_BEFORE).removesuffix(CALL_BEHIND)
        asked = fill_prompt(template, problem.prompt.rstrip(), given)
        found.append(replace(problem, asked=asked, message=asked))
    return found


def fill_prompt(template: str, code: str, given: str) -> str:
    """Fill a prompt with the function and its input in the places of {code} and {input}."""
    return template.replace("{input}", "\0").replace("{code}", code).replace("\0", given)


def find_value(answer: str) -> str | None:
    """Find the expression that an answer gives.

    Of the last assertion between the tags (or after the opening one, or in the whole text), what stands behind its
    `==`; without an assertion, the text itself. None where that is no expression.
    """
    text = answer.rpartition(ANSWER)[2].partition(END)[0].strip().strip("`").strip()
    text = text.removeprefix("python\n").strip()
    _, mark, behind = text.rpartition("assert f(")
    for candidate in (f"assert f({behind}" if mark else text, text, text.partition("==")[2].strip()):
        for reading in (candidate, candidate.partition("\n")[0]):  # with, or without what is said behind it
            if (value := _read_expression(reading)) is not None:
                return value
    return None


def _read_expression(text: str) -> str | None:
    try:
        (statement,) = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    match statement:
        case ast.Assert(test=ast.Compare(ops=[ast.Eq()], comparators=[value])):
            return ast.unparse(value)
        case ast.Expr(value=ast.Compare(left=ast.Call(func=ast.Name(id="f")), ops=[ast.Eq()], comparators=[value])):
            return ast.unparse(value)
        case ast.Expr(value=value):
            return ast.unparse(value)
    return None


def is_literal(value: str) -> bool:
    """Is an expression a value written out, as the task asks? `set()` has no other way to be written."""
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False
    return True
