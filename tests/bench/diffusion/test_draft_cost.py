"""The arithmetic of a draft's passes, against values worked out by hand and a simulation."""

from __future__ import annotations

import random

import pytest

from laguna_serve.bench.diffusion.draft_cost import DRAFTS, choose_states, find_best, find_speedup


def test_by_hand() -> None:
    assert find_speedup(0.5, 0.48, 0) == 1
    assert find_speedup(0.5, 0.48, 1) == pytest.approx(1.5 / 1.5)
    assert find_speedup(0.5, 0.0, 2, rows=0) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("chance", "expected"),
    [(0.54, (1.00, 1.12, 1.24)), (0.75, (1.05, 1.32, 1.58)), (0.844, (1.11, 1.48, 1.86)), (0.95, (1.24, 1.85, 2.52))],
)
def test_published_draft_at_its_precisions(chance: float, expected: tuple[float, ...]) -> None:
    assert [find_best(chance, cost) for cost in DRAFTS.values()] == pytest.approx(list(expected), abs=0.011)


def test_one_that_is_wrong_more_often_than_it_costs_is_not_asked() -> None:
    assert choose_states(0.6, 0.646) == 0
    assert find_best(0.6, 0.646) == 1
    assert choose_states(0.75, 0.222) == 3


def test_steps_are_those_of_a_simulation() -> None:
    draw, chance, states, passes = random.Random(0), 0.7, 3, 40_000
    steps = 0
    for _ in range(passes):
        right = 0
        while right < states and draw.random() < chance:
            right += 1
        steps += right + 1
    assert find_speedup(chance, 0.2, states) == pytest.approx(steps / passes / (1 + states * 0.22), rel=0.01)
