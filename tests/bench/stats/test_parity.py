"""Divergences: where, and of which class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.bench.stats.parity import (
    LOGIT_SPACING,
    Mismatch,
    classify,
    count_common,
    find_mismatch,
    measure_noise,
)
from laguna_serve.serving.client.logprobs import Probe, decode_probe
from laguna_serve.serving.client.records import Record


def record(*token_ids: int, text: str = "") -> Record:
    return Record("p", 0, 1, token_ids=list(token_ids), text=text)


def probe(*steps: dict[int, float]) -> Probe:
    return Probe(tuple(max(step, key=lambda token: step[token]) for step in steps), steps)


def test_the_first_differing_token_is_found() -> None:
    assert find_mismatch(record(1, 2, 3), record(1, 2, 3)) is None
    assert find_mismatch(record(1, 2, 3), record(1, 5, 3)) == Mismatch("p", 1, 2, 5)
    assert find_mismatch(record(1, 2), record(1, 2, 3)) == Mismatch("p", 2, None, 3)
    assert find_mismatch(record(1, text="a"), record(1, text="b")) == Mismatch("p", None, None, None)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_common_and_no_longer(left: list[int], right: list[int]) -> None:
    count = count_common(left, right)
    assert left[:count] == right[:count]
    assert count == min(len(left), len(right)) or left[count] != right[count]


def test_noise_leaves_out_the_divergence_and_what_follows() -> None:
    ours = probe({1: -0.1, 2: -3.0}, {3: -0.2, 4: -2.0}, {5: -0.5, 6: -0.6}, {7: -0.1, 8: -9.0})
    theirs = probe({1: -0.1, 2: -3.3}, {3: -0.25, 9: -2.0}, {6: -0.1, 5: -4.0}, {7: -5.0, 8: -0.1})
    assert measure_noise([(ours, theirs)], "float32") == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_noise_is_never_below_the_spacing_of_logits(dtype: str) -> None:
    assert measure_noise([], dtype) == LOGIT_SPACING[dtype]
    assert measure_noise([], "unknown") == LOGIT_SPACING["float32"]


@pytest.mark.parametrize(
    ("baseline_gap", "candidate_gap", "expected"),
    [
        (0.0, 0.0, "tie"),
        (0.0, 0.1, "near_tie"),
        (0.2, 0.2, "near_tie"),
        (0.21, 0.0, "defect"),
        (0.0, 0.21, "defect"),
    ],
)
def test_both_margins_must_lie_within_twice_the_noise(baseline_gap: float, candidate_gap: float, expected: str) -> None:
    start = {7: -0.1, 8: -4.0}
    ours = Probe((7, 1), (start, {1: -0.5, 2: -0.5 - baseline_gap}))
    theirs = Probe((7, 2), (start, {2: -0.5, 1: -0.5 - candidate_gap}))
    mismatch = Mismatch("p", 1, 1, 2)
    verdict = classify(mismatch, record(7, 1), record(7, 2), (ours, theirs), 0.1 + 1e-9)
    assert verdict.classification == expected
    assert verdict.baseline_top2 == [(1, -0.5), (2, -0.5 - baseline_gap)]
    assert verdict.candidate_margin == pytest.approx(candidate_gap)


def test_a_third_best_token_is_a_defect_even_if_the_best_two_are_close() -> None:
    ours = Probe((1,), ({1: -0.5, 2: -0.51},))
    theirs = Probe((3,), ({3: -0.5, 1: -0.51},))
    verdict = classify(Mismatch("p", 0, 1, 3), record(1), record(3), (ours, theirs), 0.1)
    assert verdict.classification == "defect"
    assert "baseline's best two" in verdict.reason


def test_a_mismatch_that_was_not_examined_is_a_defect() -> None:
    verdict = classify(Mismatch("p", 0, 1, 3), record(1), record(3), None, 0.1)
    assert (verdict.classification, verdict.baseline_margin) == ("defect", None)


def test_a_re_request_is_read_by_token_id() -> None:
    step = {"token_id:5": -0.25, "token_id:11": -1.5}
    found = decode_probe({"choices": [{"token_ids": [5], "logprobs": {"top_logprobs": [step]}}]})
    assert found == Probe((5,), ({5: -0.25, 11: -1.5},))
