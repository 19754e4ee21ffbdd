"""Who decodes in a step, who reads a prompt, and how many tokens are left, from the scheduler's output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from laguna_serve.plugins.adaptive.costs import Measured
from laguna_serve.plugins.adaptive.steps import begin_step, count_left


def make_output(scheduled: dict[str, int], drafts: dict[str, int], new: str = "") -> Any:
    """A scheduler's output: tokens and drafts by request; new requests by their names."""
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={request: [-1] * count for request, count in drafts.items()},
        scheduled_new_reqs=[SimpleNamespace(req_id=request) for request in new],
    )


def make_state(tokens: int, limit: int | None = None) -> Any:
    """A request that got so many tokens, of `limit`."""
    return SimpleNamespace(output_token_ids=[7] * tokens, sampling_params=SimpleNamespace(max_tokens=limit))


def test_all_decode() -> None:
    step = begin_step(1.0, make_output({"a": 4, "b": 1}, {"a": 3}), {"a": make_state(2), "b": make_state(1)})
    step.width, step.drafter_s = 7, 0.25
    assert step.end(2.0) == Measured(2, 3, 0.75, 7, 0.25, batch=2, prompt=0)


def test_who_reads_does_not_decode() -> None:
    """Of five: one with drafts, one new, a chunk of one token, one that reads anew after a preemption, one plain."""
    states = {"a": make_state(5), "chunk": make_state(0), "again": make_state(9), "d": make_state(1)}
    scheduled = {"a": 3, "n": 40, "chunk": 1, "again": 60, "d": 1}
    step = begin_step(0.0, make_output(scheduled, {"a": 2}, new="n"), states)
    assert (step.decoding, step.drafted, step.prompt) == (2, 2, 101)
    assert step.requests == set(scheduled)


def test_a_new_request_of_one_token_reads() -> None:
    step = begin_step(0.0, make_output({"n": 1, "a": 1}, {}, new="n"), {"a": make_state(3)})
    assert (step.decoding, step.drafted, step.prompt) == (1, 0, 1)


def test_tokens_left() -> None:
    assert count_left(make_state(5, 32), 4, 1000) == 23
    assert count_left(make_state(30, 32), 4, 1000) == -2
    assert count_left(make_state(5), 1, 1000) == 994


def test_later_chunk_of_a_prompt_is_read_beside_one_that_decodes() -> None:
    states = {"a": make_state(3), "chunk": make_state(0)}
    step = begin_step(0.0, make_output({"a": 1, "chunk": 40}, {}), states)
    assert (step.decoding, step.drafted, step.prompt) == (1, 0, 40)
