"""Drafts verified by few operations: what comes out has the target's distribution, whatever was proposed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

pytestmark = pytest.mark.vllm
VOCABULARY = 5
COUNTS = [2, 0, 1]
TEMPERATURES = torch.tensor([0.6, 1.0, 1.7])
# Of a request's first row among all.
FIRST = {0: 0, 1: 3, 2: 4}
RUNS = 4000


def verify(*arguments: Any) -> list[list[int]]:
    from laguna_serve.plugins.repairs.verification import verify_drawn

    found: list[list[int]] = verify_drawn(*arguments).tolist()
    return found


@pytest.mark.parametrize("kind", ["drawn", "likeliest"])
def test_tokens_have_the_targets_distribution(kind: str) -> None:
    torch.manual_seed(3)
    logits = torch.randn(sum(COUNTS) + len(COUNTS), VOCABULARY)
    proposal = torch.randn(sum(COUNTS), VOCABULARY).softmax(-1)
    firsts: dict[int, Counter[int]] = {request: Counter() for request in FIRST}
    seconds: Counter[int] = Counter()
    for _ in range(RUNS):
        drafts = torch.multinomial(proposal, 1).squeeze(1) if kind == "drawn" else proposal.argmax(-1)
        tokens = verify(logits, TEMPERATURES, drafts.int(), COUNTS, proposal if kind == "drawn" else None)
        for request, row in enumerate(tokens):
            firsts[request][row[0]] += 1
        if tokens[0][1] >= 0:
            seconds[tokens[0][1]] += 1
    chances = (logits.bfloat16().float() / TEMPERATURES.repeat_interleave(torch.tensor(COUNTS) + 1)[:, None]).softmax(
        -1
    )
    for request, counted in firsts.items():
        assert fits(counted, chances[FIRST[request]]), request
    assert fits(seconds, chances[1])


def fits(counted: Counter[int], chances: torch.Tensor) -> bool:
    """Whether counts are those of a distribution, as far as they can tell."""
    total = sum(counted.values())
    observed = [counted[token] for token in range(VOCABULARY)]
    expected = (chances.double() / chances.double().sum() * total).numpy()
    return bool(chisquare(observed, expected).pvalue > 1e-4)


def test_placeholders_of_the_scheduler_are_never_kept() -> None:
    """They are -1, which is the place of the last token, too: here by far the likeliest."""
    logits = torch.zeros(4, VOCABULARY)
    logits[:, -1] = 20.0
    for probs in (None, torch.full((3, VOCABULARY), 1 / VOCABULARY)):
        for _ in range(20):
            (row,) = verify(logits, torch.tensor([1.0]), torch.tensor([-1, -1, -1]), [3], probs)
            assert row[0] >= 0
            assert row[1:] == [-1, -1, -1]


def test_drafts_of_the_targets_own_distribution_are_kept() -> None:
    logits = torch.randn(4, VOCABULARY)
    for _ in range(50):
        drafts = torch.multinomial(logits[:3].softmax(-1), 1).squeeze(1).int()
        (tokens,) = verify(logits, torch.ones(1), drafts, [3], logits[:3].softmax(-1))
        assert tokens[:3] == drafts.tolist()
        assert tokens[3] >= 0


def test_rows_are_filled_up_behind_the_last_token() -> None:
    logits = torch.full((5, VOCABULARY), -50.0)
    for row, token in enumerate((1, 2, 3, 4, 0)):
        logits[row, token] = 50.0
    # The first one's second draft is rejected, and what comes instead is certain, too.
    drafts = torch.tensor([1, 4, 4], dtype=torch.int32)
    assert verify(logits, torch.ones(2), drafts, [2, 1], None) == [[1, 2, -1], [4, 0, -1]]


def test_nothing_without_weight_is_drawn() -> None:
    from laguna_serve.plugins.repairs.verification import draw

    cumulated = np.array([0.0, 0.0, 1.0, 1.0, 3.0, 3.0])
    assert {draw(np.array(row), 0.5) < 4 for row in ([np.nan] * 4, [0.1, 0.2, np.nan, np.nan], [np.inf] * 4)} == {True}
    assert {draw(cumulated, random) for random in (0.0, 0.25, 0.5, 2 / 3, 0.75, 1 - 2**-24)} == {2, 4}
