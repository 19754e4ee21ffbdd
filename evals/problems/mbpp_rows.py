"""MBPP and, as the hub has it, MBPP+: rows of code and test_list, brought into HumanEval's form.

Two prompts, which measure two things. `bigcode` is bigcode-evaluation-harness's (after InCoder, Fried et al. 2022): a
docstring with the task and the *first* test, from which a model writes the whole function. `project` is ours: all of
the tests in the docstring, and the function's first line behind it, so that the name and the arguments need no guess.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import replace

from laguna_serve.evals.problems.mbpp_splits import find_number
from laguna_serve.evals.problems.problem import Problem, ProblemsError
from laguna_serve.serving.kit.results import JsonObject


def read_mbpp(where: str, row: JsonObject, protocol: str) -> Problem:
    """Read a row of mbpp.jsonl or sanitized-mbpp.json.

    Raises:
        ProblemsError: the row has other fields, or its tests call no function of its solution.
    """
    number = find_number(where, row)
    try:
        text, tests = row["text"] if "text" in row else row["prompt"], [str(test) for test in row["test_list"]]
        imports = row.get("test_imports") or []
        if not isinstance(text, str) or not isinstance(imports, list):
            raise TypeError("a task or imports of another kind")
        code = row["code"].replace("\r\n", "\n").replace("\r", "\n")
        functions = {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        called = {node.id for node in ast.walk(ast.parse("\n".join(tests))) if isinstance(node, ast.Name)}
        function = next(functions[name] for name in functions if name in called)
        setup = "\n".join([*imports, row.get("test_setup_code") or ""]).strip("\n")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, SyntaxError, StopIteration) as error:
        expected = "expected MBPP's text, code and test_list, the tests calling the code's function"
        raise ProblemsError(f"{where}: {expected}, got {type(error).__name__}: {error}; fetch the set again") from None
    checks = "\n".join(
        textwrap.indent(part, "    ") for part in [f"{function.name} = candidate", *map(_flatten, tests)]
    )
    if protocol == "project":
        shown = "\n".join(tests)
        prompt = f'"""\n{text}\n{shown}\n"""\ndef {function.name}({ast.unparse(function.args)}):\n'
        # The prompt ends in the function's first line; the reference solution is a whole program of its own.
        canonical = f"    pass\n\n\n{code.rstrip()}\n"
    else:
        prompt, canonical = f'"""\n{text}\n{tests[0]}\n"""\n', f"{code.rstrip()}\n"
    return Problem(
        task_id=f"Mbpp/{number}",
        prompt=prompt,
        entry_point=function.name,
        test=f"{setup}\n\ndef check(candidate):\n{checks}\n".lstrip(),
        canonical_solution=canonical,
    )


def _flatten(test: str) -> str:
    """Make a test's lines ones that can be indented: of several, without strings that go over lines."""
    return ast.unparse(ast.parse(test.strip())) if "\n" in test.strip() else test.strip()


def read_mbpp_plus(where: str, row: JsonObject, protocol: str) -> Problem:
    """Read a row of evalplus's MBPP+ as on the hub: MBPP's tests are the base, the script in `test` has all of them.

    Raises:
        ProblemsError: the row has other fields, or its script does not end in a loop over inputs and results.
    """
    base = read_mbpp(where, row, protocol)
    try:
        tree = ast.parse(row["test"])
        start = next(node.lineno for node in tree.body if isinstance(node, ast.For)) - 1
    except (SyntaxError, TypeError, ValueError, StopIteration) as error:
        expected = 'expected a "test" that ends in a loop over its inputs'
        raise ProblemsError(f"{where}: {expected}, got {type(error).__name__}: {error}; fetch the set again") from None
    lines = row["test"].splitlines(keepends=True)
    loop = textwrap.indent("".join(lines[start:]).rstrip() + "\n", "    ")
    test = f"{''.join(lines[:start])}\n\ndef check(candidate):\n    {base.entry_point} = candidate\n{loop}"
    return replace(base, test=test, base_test=base.test)
