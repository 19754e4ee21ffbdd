"""The tests of a problem in evalplus's own form, as text: evalplus_rows.py puts a problem's data behind this file's.

It runs in the grader's process, which imports the standard library and, where there is one, numpy (not needed here).
Expected values are what the canonical solution gives for the same arguments, and two values agree as evalplus 0.3.1
says (evalplus/eval): equal; or, where the problem has a tolerance or a float was expected, of the same type and length
and everywhere within atol + 1e-7·|expected|. Unlike numpy's `allclose`, values of other shapes are never broadcast.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

RELATIVE, OF_FLOATS = 1e-7, 1e-6
SETS = {
    *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum"),
    *("intersection_array", "find_dissimilar", "Diff"),
}
NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
NUMBERS = (int, float, complex)


def load_reference(program: str, entry_point: str) -> Callable[..., Any]:
    """Load the canonical solution's function."""
    space: dict[str, Any] = {"__name__": "reference"}
    exec(compile(program, "reference.py", "exec"), space)
    function: Callable[..., Any] = space[entry_point]
    return function


def shape(arguments: list[Any], shapes: list[str]) -> list[Any]:
    """Arguments as MBPP+ means them: JSON has neither tuples nor sets nor complex numbers.

    One word of `shapes` for each argument, the last one for all that follow: a letter says what a value becomes, "["
    before it that it is of each item, "(" the same and a tuple of them, "{" of each value of a mapping.
    """
    words = [*shapes, *[shapes[-1]] * len(arguments)]
    return [shape_one(value, word) for value, word in zip(arguments, words, strict=False)]


def shape_one(value: Any, word: str) -> Any:
    """One value: "." as it is, t tuple, s set ({} where empty), f float, c complex, T tuples all the way down."""
    head, rest = word[0], word[1:]
    if head == "[":
        return [shape_one(item, rest) for item in value]
    if head == "(":
        return tuple(shape_one(item, rest) for item in value)
    if head == "{":
        return {key: shape_one(item, rest) for key, item in value.items()}
    if head == "T":
        return tuple(shape_one(item, word) for item in value) if isinstance(value, list) else value
    if head == "s":
        return set(value) if isinstance(value, list) and value else {}
    if head == "t":
        return tuple(value) if isinstance(value, list) else value
    return complex(value) if head == "c" else float(value) if head == "f" else value


def is_floats(value: Any) -> bool:
    """Say whether it is a float, or a list or tuple of nothing but floats."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def is_near(value: Any, expected: Any, tolerance: float) -> bool:
    """Everywhere within the tolerance; of numbers and (nested) lists and tuples of them."""
    if isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(is_near(one, other, tolerance) for one, other in pairs)
    if not isinstance(value, NUMBERS) or not isinstance(expected, NUMBERS):
        return False
    if value == expected:
        return True
    bound = tolerance + RELATIVE * abs(expected)
    return math.isfinite(bound) and abs(value - expected) <= bound


def agrees(value: Any, expected: Any, tolerance: float) -> bool:
    """Do two values agree? A tolerance of 0 asks for equal ones."""
    if value == expected:
        return True
    if not tolerance or type(value) is not type(expected):
        return False
    return is_near(value, expected, tolerance)


def agrees_specially(name: str, value: Any, expected: Any, tolerance: float, arguments: list[Any]) -> bool | None:
    """Judge as evalplus does where a function may give more than one value; None of all other functions.

    `name`: of the set and of the function, as "Mbpp/Diff".
    """
    if name == "HumanEval/find_zero":
        (factors, *_) = arguments
        return bool(abs(sum(factor * math.pow(value, power) for power, factor in enumerate(factors))) <= tolerance)
    data_set, _, name = name.partition("/")
    if data_set != "Mbpp":
        return None
    if name in SETS:
        return set(value) == set(expected) or None
    if name in NOT_NONE:
        return bool((value if isinstance(value, bool) else value is not None) == (expected is not None))
    if value == expected:
        return None
    if name == "are_equivalent":
        return True
    if name == "sum_div" and value == 0:
        return True
    if name == "surface_Area":
        edge, height = arguments
        slant = math.sqrt((edge / 2) ** 2 + height**2)
        return abs(value - round(edge**2 + 2 * edge * slant)) <= tolerance or None
    if name == "digit_distance_nums":
        one, other = map(str, arguments)
        width = max(len(one), len(other))
        digits = zip(one.zfill(width), other.zfill(width), strict=True)
        return bool(value == sum(abs(int(left) - int(right)) for left, right in digits)) or None
    return None


def assert_right(name: str, value: Any, expected: Any, tolerance: float, arguments: list[Any]) -> None:
    """One test; `name` as agrees_specially takes it.

    Raises:
        AssertionError: the value is not right for these arguments.
    """
    verdict = agrees_specially(name, value, expected, tolerance, arguments)
    right = agrees(value, expected, tolerance) if verdict is None else verdict
    assert right, f"expected {str(expected)[:60]}, got {str(value)[:60]}"


def read_inputs(text: str, shapes: list[str]) -> list[list[Any]]:
    """Read the arguments of every call, from JSON."""
    return [shape(arguments, shapes) for arguments in json.loads(text)]


def copy_all(arguments: list[Any]) -> list[Any]:
    """Copy the arguments once more."""
    return copy.deepcopy(arguments)
