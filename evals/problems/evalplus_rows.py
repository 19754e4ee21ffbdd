"""HumanEval+ and MBPP+ in evalplus's own files (HumanEvalPlus.jsonl, v0.1.10; MbppPlus.jsonl, v0.2.0).

There are no expected values in them: a row has inputs (`base_input`, the published set's; `plus_input`, evalplus's) and
the canonical solution, which is run on them beside the program (evalplus_check.py). The base verdict asks for the base
inputs alone, the plus verdict for both, as evalplus's do.
"""

from __future__ import annotations

import ast
import json
import math
from functools import cache
from pathlib import Path

from laguna_serve.evals.problems.problem import Problem, ProblemsError
from laguna_serve.serving.kit.results import JsonObject

TEXTS = ("task_id", "prompt", "entry_point", "canonical_solution")
# What MBPP+'s arguments are, by task id, where JSON cannot say it (evalplus_check.shape); read off the canonical
# solutions' contracts, and equal on every input to what evalplus 0.3.1 makes of them.
SHAPES: dict[str, tuple[int, ...]] = {
    "t": (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
    "[t": (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
    "[t .": (75, 413, 444, 753),
    ". t": (106, 750),
    "[s": (115,),
    "f c": (124,),
    "t .": (250, 307, 405, 446, 617, 720, 763, 808),
    "(t": (259, 278, 401, 445),
    "{t .": (722,),
    "c": (252,),
    "T": (580, 615, 791),
}
CHECK = """

_INPUTS = read_inputs({inputs!r}, {shapes!r})
_REFERENCE = load_reference({program!r}, {entry_point!r})


def check(candidate):
    tolerance = {tolerance!r}
    for arguments in _INPUTS:
        expected = _REFERENCE(*copy_all(arguments))
        if not tolerance and is_floats(expected):
            tolerance = OF_FLOATS
        assert_right({name!r}, candidate(*arguments), expected, tolerance, arguments)
"""


def read_evalplus(where: str, row: JsonObject, _: str) -> Problem:
    """Read a row of evalplus's own files.

    Raises:
        ProblemsError: a field is missing or of another kind, or there is no input.
    """
    for field in TEXTS:
        if not isinstance(row.get(field), str) or not row[field]:
            raise ProblemsError(f'{where}: expected a text as "{field}", got {str(row.get(field))[:80]!r}; add it')
    for field in ("base_input", "plus_input"):
        inputs = row[field] or []  # Mbpp/793 has {} for none
        if not isinstance(inputs, list) or not all(isinstance(arguments, list) for arguments in inputs):
            raise ProblemsError(f'{where}: expected a list of lists of arguments as "{field}", got another; fix it')
    tolerance = row.get("atol", 0)
    if not row["base_input"] or not _is_tolerance(tolerance):
        raise ProblemsError(f'{where}: expected inputs in "base_input" and a number as "atol", got others; fix it')
    program = row["prompt"] + row["canonical_solution"]
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError) as error:
        expected = 'expected Python as "prompt" and "canonical_solution" together'
        raise ProblemsError(f"{where}: {expected}, got {error}; fix it") from None
    parts = {
        "entry_point": row["entry_point"],
        "name": f"{row['task_id'].partition('/')[0]}/{row['entry_point']}",
        "program": program,
        "shapes": _find_shapes(row["task_id"]),
        "tolerance": tolerance,
    }
    base, plus = (
        _read_source() + CHECK.format(inputs=json.dumps(inputs), **parts)
        for inputs in (row["base_input"], row["base_input"] + (row["plus_input"] or []))
    )
    return Problem(
        task_id=row["task_id"],
        prompt=row["prompt"],
        entry_point=row["entry_point"],
        test=plus,
        canonical_solution=row["canonical_solution"],
        base_test=base,
    )


def _is_tolerance(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _find_shapes(task_id: str) -> list[str]:
    name, _, number = task_id.partition("/")
    found = (word for word, numbers in SHAPES.items() if name == "Mbpp" and number in map(str, numbers))
    return next(found, ".").split()


@cache
def _read_source() -> str:
    return Path(__file__).with_name("evalplus_check.py").read_text(encoding="utf-8")
