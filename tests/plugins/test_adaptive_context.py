"""Rows that wait for the drafter's cache: in order, whole, and gone with the request that they are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laguna_serve.plugins.adaptive.context import (
    KEPT_ROWS,
    LEAST_ROWS,
    MOST_DROPPED,
    MOST_ROWS,
    MOST_STEPS,
    WaitingContext,
)


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
    context.add(
        taps, buffer, buffer + 100, list(owners), None if kept is None else torch.tensor(kept, dtype=torch.int64)
    )
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
    context.end(model, {"a": 0, "c": 0, "nobody": 0})
    assert context.rows == 2
    add(context, 7, "a")  # begun anew, as after a preemption
    context.write(model)
    assert model.stored == [([2.0, 4.0, 7.0], [2, 4, 7], [102, 104, 107])]
    add(context, 9, "a")
    context.end(model, {"a": 0})
    context.write(model)
    assert len(model.stored) == 1


def test_rows_that_others_may_read_are_written_when_their_request_ends() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "abab")
    add(context, 4, "abc")
    context.end(model, {"a": 3, "c": 0, "b": 9})
    assert model.stored == [([0.0, 1.0, 2.0, 3.0, 5.0], [0, 1, 2, 3, 5], [100, 101, 102, 103, 105])]
    assert context.rows == 0
    context.write(model)
    assert len(model.stored) == 1
    add(context, 7, "ab")
    context.end(model, {"a": 100})
    assert model.stored[1:] == [([7.0], [7], [107])]
    context.write(model)
    assert model.stored[2:] == [([8.0], [8], [108])]


def test_many_steps_are_put_together() -> None:
    context, model = WaitingContext(), Model()
    for number in range(MOST_STEPS + 3):
        add(context, 2 * number, "ab", kept=[0, 1] if number % 2 else None)
    assert (context.rows, len(context._steps)) == (2 * MOST_STEPS + 6, 3)
    context.end(model, {"b": 0})
    context.write(model)
    assert model.stored[0][1][: MOST_STEPS + 3] == list(range(0, 2 * MOST_STEPS + 6, 2))


def test_a_step_may_have_no_rows() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "ab", kept=[])
    context.end(model, {"a": 0})
    context.write(model)
    add(context, 0, "ab")
    context.write(model)
    assert model.stored == [([0.0, 1.0], [0, 1], [100, 101])]


def test_numbers_of_rows_come_again_where_many_are_written() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "a" * 70)
    context.write(model)
    (_, positions, slots) = model.stored[0]
    assert positions == [*range(70), *[69] * 10]
    assert slots == [100 + position for position in positions]


def test_requests_that_end_beside_long_ones_cost_a_copy_of_each_row_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred rows of one that goes on, and ten thousand of requests of ten rows, one of which ends in every step."""
    context, model, clear, copied, kept = WaitingContext(), Model(), WaitingContext._clear_away, [0], [0]

    def count(context: WaitingContext) -> None:
        clear(context)
        copied[0] += context.rows

    monkeypatch.setattr(WaitingContext, "_clear_away", count)
    for number in range(1000):
        add(context, 11 * number, ("l" if number % 10 == 0 else "") + chr(1000 + number) * 10)
        context.end(model, {chr(1000 + number): 0} if number % 3 else {})
        kept.append(context._end + context._fresh)
    alive = context.rows
    assert alive == 100 + 10 * 334
    assert copied[0] < 10_100 / MOST_DROPPED
    assert max(kept) <= (1 + MOST_DROPPED) * alive + LEAST_ROWS
    assert not model.stored
    context.write(model)
    assert len({slot for _, _, slots in model.stored for slot in slots}) == alive


def test_room_for_many_rows_is_given_back() -> None:
    context, model = WaitingContext(), Model()
    add(context, 0, "a" * (KEPT_ROWS + 1))
    context.end(model, {})
    assert len(context._states) > KEPT_ROWS
    context.write(model)
    assert len(context._states) == 0
    add(context, 0, "ab")
    context.write(model)
    assert model.stored[-1] == ([0.0, 1.0], [0, 1], [100, 101])


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
