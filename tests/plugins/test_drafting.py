"""The drafter's part of a step on a CPU: rows by hand, and drafts beside stock vLLM's in the same steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from probes import run_probe

from laguna_serve.plugins.drafting.rows import (
    Accepted,
    Queries,
    find_kept,
    find_verified,
    place_queries,
    read_accepted,
)

TOY = Path(__file__).resolve().parent.parent / "toy"


def test_what_was_accepted_is_read_per_request() -> None:
    sampled = [[5, 6, -1, -1], [7, -1, -1, -1], [8, 9, 1, 2], [3, -1, -1, -1]]
    read = read_accepted(sampled, [3, 3, 3, 0], 100, [None] * 4)
    assert read == Accepted([6, 7, 2, 3], [2, 3, 0, 0])


def test_a_request_that_reads_its_prompt_goes_on_with_the_prompt() -> None:
    assert read_accepted([[5], [6]], None, 100, [42, None]) == Accepted([42, 6], [0, 0])


def test_tokens_outside_the_vocabulary_are_none() -> None:
    assert read_accepted([[5, 100, -1]], [2], 100, [None]) == Accepted([5], [2])


@pytest.mark.parametrize(
    ("bounds", "rejected", "expected"),
    [
        ([0, 8], [3], [0, 1, 2, 3, 4]),
        ([0, 3, 5], [0, 1], [0, 1, 2, 3]),
        ([0, 3, 5, 9], [1, 0, 2], [0, 1, 3, 4, 5, 6]),
        ([0, 70], [3], [*range(67), *[66] * 13]),
        ([0, 60, 70], [1, 0], [*range(59), *range(60, 70), *[69] * 11]),
    ],
)
def test_rejected_rows_are_left_out(bounds: list[int], rejected: list[int], expected: list[int]) -> None:
    rows = np.arange(bounds[-1])
    assert rows[find_kept(bounds, rejected)].tolist() == expected


def test_queries_follow_the_last_token_over_blocks_and_stay_in_the_last_one() -> None:
    table = np.array([[4, 7, 0], [2, 9, 0]], dtype=np.int32)[:, :2]
    queries = Queries(np.full(9, -5, np.int32), np.full(9, -5), np.full(9, -5), np.empty(2, np.int32))
    accepted, positions = Accepted(last=[31, 32], rejected=[0, 2]), np.array([0, 1, 5, 6, 7, 8])
    place_queries(accepted, [0, 2, 6], positions, np.array([2, 9], np.int32), table, 4, 3, 3, queries)
    assert queries.ids.tolist() == [31, 3, 3, 32, 3, 3, -5, -5, -5]
    assert queries.positions.tolist() == [2, 3, 4, 7, 8, 9, -5, -5, -5]
    assert queries.slots.tolist() == [4 * 4 + 2, 4 * 4 + 3, 7 * 4, 9 * 4 + 3, 9 * 4, 9 * 4 + 1, -5, -5, -5]
    assert queries.lengths.tolist() == [5, 10]


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_rows_that_verify(kind: type) -> None:
    found = find_verified(np.array([3, 0, 2, 0, 1], np.int32), np.array([4, 104, 107, 207, 209], kind))
    assert found.logits.tolist() == [0, 1, 2, 3, 103, 104, 105, 106, 206, 207, 208]
    assert found.target.tolist() == [0, 1, 2, 5, 6, 9]
    assert found.bonus.tolist() == [3, 4, 7, 8, 10]


@pytest.mark.vllm
@pytest.mark.parametrize("kernels", ["vllm", "ours"])
@pytest.mark.parametrize("drafter", ["dflash", "dflash-speculators"])
def test_drafts_are_those_of_stock_vllm(drafter: str, kernels: str) -> None:
    seen = run_probe("drafting_probe.py", str(TOY), drafter, kernels)
    # A context that is made by one call is rounded elsewhere: of tokens that are nearly as likely, another comes first.
    assert seen["differing"] <= (0.03 * seen["drafts"] if kernels == "ours" else 0)
    assert seen["steps"] > 20
    assert seen["together"] == 3
    assert min(seen["rejected"], seen["reading"]) > 0
