"""The exact tests: values worked out by hand, and no more false alarms than they promise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest

from laguna_serve.evals.equivalence.exchangeability import Bools, find_apart_p, find_scatter_p


def differ(answers: str) -> Bools:
    """Answers as letters, the baseline's half first."""
    return np.array([[a != b for b in answers] for a in answers])


@pytest.mark.parametrize(
    ("problems", "expected"),
    [
        ([], 1.0),
        (["AAAA", "AAAA"], 1.0),
        (["AABB"], 1 / 3),  # AABB, ABAB, ABBA are equally likely
        (["AABB", "AAAA"], 1 / 3),  # a problem without differences says nothing
        (["AABB"] * 3, 1 / 27),
        (["AAAB"], 1.0),  # one odd answer lies on some side
        (["ABAB"], 1.0),
        (["AABB", "ABAB"], 5 / 9),  # at least as far apart: not both like ABAB, which has 4/9
        (["AAABBB"], 1 / 10),
        (["AAAAAABBBBBB"], 1 / 462),
    ],
)
def test_chance_that_arms_are_this_far_apart(problems: list[str], expected: float) -> None:
    assert find_apart_p([differ(answers) for answers in problems]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("problems", "expected"),
    [
        ([], 1.0),
        (["AABB"], 1.0),  # both arms are steady
        (["ABAB"], 1.0),  # both are not
        (["AAAB"], 0.5),
        (["ABAA"], 1.0),
        (["AAAB"] * 5, 1 / 32),
        (["AAAB", "AAAB", "ABAA"], 0.5),
    ],
)
def test_chance_that_the_candidate_scatters_this_much_more(problems: list[str], expected: float) -> None:
    assert find_scatter_p([differ(answers) for answers in problems]) == pytest.approx(expected)


@pytest.mark.parametrize("test", [find_apart_p, find_scatter_p])
@pytest.mark.parametrize("answers", [("AABB", "ABCD", "AAAB"), ("AABB", "AABB", "AABB"), ("AABC", "AAAB", "AAAB")])
def test_over_all_labellings_a_small_p_is_as_rare_as_it_says(
    test: Callable[[list[Bools]], float], answers: tuple[str, ...]
) -> None:
    labellings = [sorted({"".join(order) for order in permutations(one)}) for one in answers]
    found = [test([differ(one) for one in relabelled]) for relabelled in product(*labellings)]
    for p in set(found):
        assert sum(other <= p + 1e-12 for other in found) / len(found) <= p + 1e-9
