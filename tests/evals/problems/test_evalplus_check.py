"""The comparison of evalplus's tests, on values; the jail's part is in test_published_files.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.evals.problems.evalplus_check import agrees, agrees_specially, is_floats, is_near, shape

NUMBERS = st.floats(width=64) | st.integers(-(10**9), 10**9) | st.sampled_from([0.0, 1.0, 1.0 + 1e-7, 1.0 - 2e-6, -0.0])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), st.sampled_from([1e-6, 1e-4, 0.5]))
def test_nearness_is_numpys_of_equal_shapes(pairs: list[tuple[float, float]], tolerance: float) -> None:
    values, expected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with np.errstate(all="ignore"):
        theirs = bool(np.allclose(values, expected, rtol=1e-7, atol=tolerance))
        nested = bool(np.allclose([values, values], [expected, expected], rtol=1e-7, atol=tolerance))
    assert is_near(values, expected, tolerance) == theirs
    assert is_near((values, values), [expected, expected], tolerance) == nested


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "right"),
    [
        (1, 1.0, 0, True),
        ([1, 2], (1, 2), 0, False),
        (1.0 + 5e-7, 1.0, 1e-6, True),
        (1 + 1e-7, 1, 1e-6, False),  # a float where an int was expected
        ([1.0, 2.0 + 1e-7], [1.0, 2.0], 1e-6, True),
        ((1.0, 2.0 + 1e-7), [1.0, 2.0], 1e-6, False),
        ([1.0], [1.0, 1.0], 1e-4, False),
        ([], [1.0], 1e-4, False),
        ([], 1.0, 1e-4, False),
        ([[1.0, 1.0]], [1.0], 1e-4, False),  # numpy would broadcast it
        (math.nan, 1.0, 1e-4, False),
        (math.nan, math.nan, 1e-4, False),
        (math.inf, math.inf, 1e-4, True),
        (1e308, math.inf, 1e-4, False),
        ("1.0", "1.00", 1e-4, False),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, 1e-4, False),
        ([1.0, None], [1.0 + 1e-9, None], 1e-4, False),
        (1 + 1e-9j, 1 + 0j, 1e-6, True),
        (lambda: 1, 1.0, 1e-4, False),
        (True, 1.0, 0, True),
    ],
)
def test_values_agree(value: Any, expected: Any, tolerance: float, right: bool) -> None:
    assert agrees(value, expected, tolerance) is right


@pytest.mark.parametrize(
    ("name", "value", "expected", "arguments", "verdict"),
    [
        ("Mbpp/Diff", [2, 1, 1], [1, 2], [], True),
        ("Mbpp/Diff", [2], [1, 2], [], None),
        ("HumanEval/Diff", [2, 1], [1, 2], [], None),
        ("Mbpp/check_str", True, object(), [], True),
        ("Mbpp/check_str", object(), object(), [], True),
        ("Mbpp/check_str", False, None, [], True),
        ("Mbpp/check_str", None, None, [], True),
        ("Mbpp/check_str", "yes", None, [], False),
        ("Mbpp/are_equivalent", False, True, [], True),
        ("Mbpp/sum_div", 0, 7, [], True),
        ("Mbpp/sum_div", 1, 7, [], None),
        ("Mbpp/surface_Area", 0, 1, [3, 4], None),
        ("Mbpp/surface_Area", round(9 + 6 * math.hypot(1.5, 4)), 33, [3, 4], True),
        ("Mbpp/digit_distance_nums", 11, 1, [100, 28], True),
        ("Mbpp/digit_distance_nums", 8, 1, [100, 28], None),
        ("HumanEval/find_zero", 2.0, 3.0, [[-6, 3]], True),
        ("HumanEval/find_zero", -50.0, 3.0, [[-6, 3]], False),
        ("Mbpp/find_zero", 2.0, 3.0, [[-6, 3]], None),
    ],
)
def test_functions_with_more_than_one_right_value(
    name: str, value: Any, expected: Any, arguments: list[Any], verdict: bool | None
) -> None:
    assert agrees_specially(name, value, expected, 1e-4 if "zero" in name else 0, arguments) is verdict


@pytest.mark.parametrize(
    ("words", "arguments", "meant"),
    [
        ("t", [[1, 2], [3]], [(1, 2), (3,)]),
        ("t", ["ab", 3], ["ab", 3]),
        ("[t", [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        ("[t .", [[[1, 2]], [3]], [[(1, 2)], [3]]),
        (". t", [[1], [2]], [[1], (2,)]),
        ("t .", [[1], [2], [3]], [(1,), [2], [3]]),
        ("[s", [[[1, 2], []]], [[{1, 2}, {}]]),
        ("f c", ["1", "2j"], [1.0, 2j]),
        ("(t", [[[1], 2]], [((1,), 2)]),
        ("{t .", [{"a": [1]}, [2]], [{"a": (1,)}, [2]]),
        ("T", [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (".", [[1], {"a": 1}], [[1], {"a": 1}]),
    ],
)
def test_arguments_take_their_types(words: str, arguments: list[Any], meant: list[Any]) -> None:
    assert repr(shape(arguments, words.split())) == repr(meant)


def test_floats_are_told() -> None:
    assert [is_floats(value) for value in (1.0, [1.0], (1.0, 2.0), [], [1], 1, "1.0", [1.0, 1])] == [True] * 3 + [
        False
    ] * 5
