"""DANTE's losses against literal transcriptions of the formulas, with the minus signs that the page lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laguna_serve.scripts.training.dante.losses import (
    IGNORED,
    Anchor,
    confidence_weight,
    embedding_drift,
    schedule_ce,
    schedule_tea,
    sequence_cross_entropy,
    weighted_cross_entropy,
)


@given(st.floats(0, 20))
def test_weight_is_the_formula_and_falls(entropy: float) -> None:
    got = confidence_weight(torch.tensor([entropy, entropy + 0.5], dtype=torch.float64))
    assert float(got[0]) == pytest.approx(0.30 + 0.70 / (1 + math.exp(1.5 * (entropy - 1.5))), abs=1e-12)
    assert got[1] < got[0]


def test_weight_at_the_points_that_the_page_speaks_of() -> None:
    """Not "full weight" for a sure teacher, but 0.933; half-way at 1.5 nats; never below 0.30."""
    got = confidence_weight(torch.tensor([0.0, 1.5, 1e4]))
    assert got.tolist() == pytest.approx([0.9332, 0.65, 0.30], abs=1e-4)
    assert float(confidence_weight(torch.tensor(0.2), center=0.2)) == pytest.approx(0.65)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 7))
def test_cross_entropy_is_each_sequences_mean(seed: int, rows: int, length: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 5, generator=draw)
    labels = torch.randint(0, 5, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) < 0.4] = IGNORED
    got = sequence_cross_entropy(logits, labels)
    for row in range(rows):
        losses = [
            -math.log(math.exp(logits[row, t, labels[row, t + 1]]) / sum(math.exp(x) for x in logits[row, t].tolist()))
            for t in range(length - 1)
            if labels[row, t + 1] != IGNORED
        ]
        assert float(got[row]) == pytest.approx(sum(losses) / len(losses) if losses else 0.0, abs=1e-5)


def test_long_answers_weigh_no_more_than_short_ones() -> None:
    """The mean over sequences of means, not over all tokens: two rows of 1 and 3 labelled tokens."""
    logits = torch.zeros(2, 4, 3)
    logits[0, :, 0] = 5.0
    labels = torch.tensor([[IGNORED, 0, IGNORED, IGNORED], [IGNORED, 1, 1, 1]])
    losses = sequence_cross_entropy(logits, labels)
    assert float(weighted_cross_entropy(losses, torch.tensor([1.0, 0.5]))) == pytest.approx(
        (float(losses[0]) + 0.5 * math.log(3)) / 2, abs=1e-6
    )


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 10))
def test_drift_is_zero_at_the_start_and_free_of_scale(seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    start, moved = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    kinds: tuple[Anchor, ...] = ("relative", "sum", "none")
    assert [float(embedding_drift(start, start, kind)) for kind in kinds] == [0, 0, 0]
    literal = sum((a - b) ** 2 for a, b in zip(moved.flatten().tolist(), start.flatten().tolist(), strict=True))
    assert float(embedding_drift(moved, start, "sum")) == pytest.approx(literal, rel=1e-4)
    relative = float(embedding_drift(moved, start))
    assert relative == pytest.approx(literal / sum(a * a for a in start.flatten().tolist()), rel=1e-4)
    assert float(embedding_drift(moved * scale, start * scale)) == pytest.approx(relative, rel=1e-3)


@given(st.integers(0, 3000))
def test_schedules_are_the_published_ones(step: int) -> None:
    assert schedule_ce(step, 2000, 200) == pytest.approx(min(1.0, 0.70 + 0.30 * max(0, step - 200) / 1800))
    assert schedule_tea(step, 2000) == pytest.approx(max(0.1, 1 - 0.9 * step / 2000))


def test_schedules_ends() -> None:
    assert [schedule_ce(t, 2000, 200) for t in (0, 200, 2000)] == pytest.approx([0.70, 0.70, 1.0])
    assert [schedule_tea(t, 2000) for t in (0, 1000, 2000)] == pytest.approx([1.0, 0.55, 0.1])
    assert schedule_ce(5, 5, 5) == 0.70  # nothing but warm-up
