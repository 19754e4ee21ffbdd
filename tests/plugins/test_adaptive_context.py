"""Rows that wait for the drafter's cache: in order, whole, and gone with the request that they are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laguna_serve.plugins.adaptive import context as waiting
from laguna_serve.plugins.adaptive.context import LEAST_ROWS, MOST_DROPPED, MOST_ROWS, WaitingContext


class Model:
    """Writes down what it is given to store."""

    def __init__(self) -> None:
        self.stored: list[tuple[list[float], list[int], list[int]]] = []

    def combine_hidden_states(self, states: torch.Tensor) -> torch.Tensor:
        return states.sum(dim=-1)

    def precompute_and_store_context_kv(self, states: Any, positions: Any, slots: Any) -> None:
        self.stored.append((states.tolist(), positions.tolist(), slots.tolist()))


def add(context: WaitingContext, first: int, owners: str, kept: list[int] | None = None) -> None:
    """Rows from `first` on, each of two taps whose sum is its number; the runner's buffers are longer."""
    rows = len(owners)
    numbers = torch.arange(first, first + rows)
    taps = [torch.cat([numbers.float(), torch.full((3,), 9e9)])[:, None] / 2] * 2
    buffer = numbers.clone()
    context.add(taps, buffer, buffer + 100, list(owners), None if kept is None else torch.tensor(kept))
    buffer.zero_()  # as the next step overwrites it


def test_rows_are_written_once_in_their_order() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "aab")
    add(context, 3, "ab", kept=[1])
    assert context.rows == 4
    context.write(model)
    context.write(model)
    assert model.stored == [([0.0, 1.0, 2.0, 4.0], [0, 1, 2, 4], [100, 101, 102, 104])]
    assert context.rows == 0
    assert context.row_s > 0


def test_rows_of_who_has_gone_are_not_written_and_those_of_a_namesake_are() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "aabc")
    add(context, 4, "bc")
    add(context, 6, "a")
    context.drop(["a", "c", "nobody"])
    assert context.rows == 2
    add(context, 7, "a")  # begun anew, as after a preemption
    context.write(model)
    assert model.stored == [([2.0, 4.0, 7.0], [2, 4, 7], [102, 104, 107])]
    add(context, 9, "a")
    context.drop(["a"])
    context.write(model)
    assert len(model.stored) == 1


def test_requests_that_end_beside_long_ones_cost_a_copy_of_each_row_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred rows of one that goes on, and ten thousand of requests of ten rows, one of which ends in every step."""
    context, model, pick, picked, kept = WaitingContext(), Model(), waiting._pick, [0], [0]

    def count(step: Any, rows: list[int]) -> Any:
        picked[0] += len(rows)
        return pick(step, rows)

    monkeypatch.setattr(waiting, "_pick", count)
    for number in range(1000):
        add(context, 11 * number, ("l" if number % 10 == 0 else "") + chr(1000 + number) * 10)
        context.drop([chr(1000 + number)] if number % 3 else [])
        kept.append(sum(len(step.owners) for step in context._steps))
    alive = context.rows
    assert alive == 100 + 10 * 334
    assert picked[0] < 10_100 / MOST_DROPPED
    assert max(kept) <= (1 + MOST_DROPPED) * alive + LEAST_ROWS
    context.write(model)
    assert len({slot for _, _, slots in model.stored for slot in slots}) == alive


def test_so_many_wait_at_most() -> None:
    context = WaitingContext()
    assert not context.is_full
    add(context, 0, "a" * (MOST_ROWS - 1))
    assert not context.is_full
    add(context, MOST_ROWS - 1, "b")
    assert context.is_full
    large = WaitingContext()
    states = torch.zeros(600, 60_000)
    large.add([states], torch.arange(600), torch.arange(600), ["a"] * 600, None)
    assert large.is_full, "by its bytes"
