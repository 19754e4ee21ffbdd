"""Run as a script: breaks the canonical solutions of a problems file in small ways and reports what the tests miss.

    python mutation_probe.py PROBLEMS.jsonl

A mutant differs from the canonical solution in one comparison, operator, number or text, or lacks one `if`. Prints one
JSON object per problem: what its tests say of the canonical solution and of a function that returns None, which of the
docstring's examples are false, and the mutants: how many ran to an end, and the sources of those that passed. The code
comes from this repository, so limits on memory and on processor time (against mutants that loop for ever) will do.
"""

from __future__ import annotations

import ast
import doctest
import json
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MUTANT_S = 0.3  # of processor time: several times what the slowest canonical solution takes for all its tests
MEMORY_BYTES = 1 << 30
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}


class OutOfTime(BaseException):
    """The processor time of one mutant is spent."""


def list_mutants(source: str, entry_point: str) -> Iterator[str]:
    """Each program that differs from `source` in one place of the function's body. Messages of errors stay."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point)
    for node in list(_walk(function.body[1:])):  # [0] is the docstring
        for field, value in _list_changes(node):
            kept = getattr(node, field)
            setattr(node, field, value)
            yield ast.unparse(tree)
            setattr(node, field, kept)


def _walk(nodes: list[Any]) -> Iterator[ast.AST]:
    for node in nodes:
        yield node
        if not isinstance(node, ast.Raise):
            yield from _walk(list(ast.iter_child_nodes(node)))


def _list_changes(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield "ops", [*node.ops[:index], SWAPS[type(operator)](), *node.ops[index + 1 :]]
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, str):
        yield "value", node.value + (1 if type(node.value) is int else "x")
    elif isinstance(node, ast.If | ast.IfExp):
        yield "test", ast.Constant(value=False)
        yield "test", ast.Constant(value=True)


def run_tests(program: str, problem: dict[str, Any]) -> str:
    """`passed`, `failed`, or `unending` where the program exhausted its time or memory."""
    signal.setitimer(signal.ITIMER_VIRTUAL, MUTANT_S)
    try:
        names: dict[str, Any] = {}
        exec(f"{program}\n{problem['test']}", names)
        names["check"](names[problem["entry_point"]])
    except (OutOfTime, MemoryError):
        return "unending"
    except Exception:
        return "failed"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return "passed"


def count_false_examples(program: str, entry_point: str) -> tuple[int, int]:
    """(examples in the docstring, those of them that are not true)."""
    names: dict[str, Any] = {}
    exec(program, names)
    tests = doctest.DocTestFinder().find(names[entry_point], entry_point, module=False, globs=names)
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test, out=sys.stderr.write)
    return runner.tries, runner.failures


def probe(problem: dict[str, Any]) -> dict[str, Any]:
    """Everything about one problem."""
    program = problem["prompt"] + problem["canonical_solution"]
    mutants = list(list_mutants(program, problem["entry_point"]))
    outcomes = [run_tests(mutant, problem) for mutant in mutants]
    examples, false_examples = count_false_examples(program, problem["entry_point"])
    return {
        "task_id": problem["task_id"],
        "canonical": run_tests(program, problem),
        "empty": run_tests(problem["prompt"] + "    return None\n", problem),
        "examples": examples,
        "false_examples": false_examples,
        "ended": sum(outcome != "unending" for outcome in outcomes),
        "passed": [mutant for mutant, outcome in zip(mutants, outcomes, strict=True) if outcome == "passed"],
    }


def _stop(signum: int, frame: Any) -> None:
    raise OutOfTime


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGVTALRM, _stop)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        print(json.dumps(probe(json.loads(line))), flush=True)
