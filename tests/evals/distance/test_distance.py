"""The arithmetic of distances, by hand: tokens, paired means and their intervals, times; and how they are shown."""

from __future__ import annotations

import random

import pytest

from laguna_serve.evals.distance.comparison import compare_tokens, list_scored, score, summarise_speed
from laguna_serve.evals.distance.kept import Stretch
from laguna_serve.evals.distance.options import check_vocabularies, find_canvas, find_context, parse_other


def test_positions_are_those_of_the_longer_answer() -> None:
    found = compare_tokens([(1, 2, 3), (4, 5), (6,), ()], [(1, 9, 3), (4, 5), (6, 7, 8), ()])
    # 2 of 3, 2 of 2, 1 of 3, none of none.
    assert (found.identical, found.same, found.positions) == (2, 5, 8)
    assert found.share == 5 / 8


def test_a_token_more_makes_all_behind_it_others() -> None:
    assert compare_tokens([(1, 2, 3, 4)], [(0, 1, 2, 3, 4)]).share == 0


def test_empty_answers_have_no_positions() -> None:
    assert compare_tokens([(), ()], [(), ()]).share == 1
    assert compare_tokens([()], [(1,)]).share == 0


def test_means_and_differences_are_over_prompts() -> None:
    found = score([1.0, 2.0, 6.0], [0.5, 2.5, 3.0], seed=0)
    assert (found.mean, found.prompts) == (3.0, 3)
    assert found.difference == pytest.approx(1.0)
    assert found.ci95 is not None
    # Of three differences every mean lies between the smallest and the largest.
    assert -0.5 <= found.ci95[0] < 1.0 < found.ci95[1] <= 3.0


def test_intervals_are_paired() -> None:
    """Prompts are a hundred times as far apart as the references: what is common to both cancels."""
    draw = random.Random(0)
    hard = [draw.uniform(0, 100) for _ in range(50)]
    found = score([value + 1 + draw.uniform(-0.1, 0.1) for value in hard], hard, seed=0)
    assert found.ci95 is not None
    assert found.difference is not None
    assert 0.95 < found.ci95[0] < found.difference < found.ci95[1] < 1.05
    # The same values of other prompts.
    crossed = score([value + 1 for value in hard[1:] + hard[:1]], hard, seed=0)
    assert crossed.ci95 is not None
    assert crossed.ci95[0] < -3 < 5 < crossed.ci95[1]


def test_no_difference_is_none_for_certain() -> None:
    found = score([1.0, 2.0], [1.0, 2.0], seed=0)
    assert (found.difference, found.ci95) == (0.0, (0.0, 0.0))


def test_one_prompt_has_no_interval_and_the_baseline_no_difference() -> None:
    assert score([2.0], [1.0], seed=0).ci95 is None
    baseline = score([2.0, 4.0], None, seed=0)
    assert (baseline.mean, baseline.difference, baseline.ci95) == (3.0, None, None)


def test_prompts_with_an_empty_answer_are_not_scored() -> None:
    assert list_scored({"baseline": [(1,), (), (1,)], "other": [(1,), (1,), ()]}) == [0]


def test_stretches_are_summed() -> None:
    found = summarise_speed([Stretch(3, 30, 24, 2.0), Stretch(1, 10, 4, 3.0)])
    assert found is not None
    assert (found.answers, found.steps_per_answer, found.tokens_per_s) == (4, 7.0, 8.0)
    uncounted = summarise_speed([Stretch(3, 30, 24, 2.0), Stretch(1, 10, None, 3.0)])
    assert uncounted is not None
    assert uncounted.steps_per_answer is None
    assert summarise_speed([]) is None


@pytest.mark.parametrize(
    ("most", "flags", "canvas"),
    [
        (33, {}, 64),
        (64, {"a": ""}, 64),
        (48, {"a": "--block-length 48"}, 48),
        (33, {"a": "--block-length=8", "b": "--block-length 16"}, 48),
        (33, {"a": "", "b": "--block-length 8"}, 64),
    ],
)
def test_canvases_are_of_whole_blocks(most: int, flags: dict[str, str], canvas: int) -> None:
    assert find_canvas(most, flags) == canvas


def test_the_shortest_context_that_flags_name_counts() -> None:
    assert find_context({"a": "--max-model-len 90", "b": "--cache dual", "c": "--max-model-len=70"}) == 70
    assert find_context({"a": ""}) is find_context({}) is None


def test_others_are_a_name_and_flags() -> None:
    assert parse_other("fast=--cache dual --threshold 0.9") == ("fast", "--cache dual --threshold 0.9")
    assert parse_other("same=") == ("same", "")


def test_vocabularies_of_names_that_are_not_here_are_left_to_the_engines() -> None:
    check_vocabularies("org/away", "org/away-too")
    check_vocabularies(None, None)
