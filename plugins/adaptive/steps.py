"""What a step is made of, told from the scheduler's output: who decodes, who reads a prompt, who will end; pure.

Checked against vLLM 0.32.0 (`SchedulerOutput`, `CachedRequestState`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from laguna_serve.plugins.adaptive.costs import Measured


class Output(Protocol):
    """What is read of vLLM's `SchedulerOutput`."""

    num_scheduled_tokens: Mapping[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: Mapping[str, Sequence[int]]
    scheduled_new_reqs: Sequence[object]


class Sampling(Protocol):
    """What is read of vLLM's `SamplingParams`."""

    max_tokens: int | None


class State(Protocol):
    """What is read of vLLM's `CachedRequestState`."""

    output_token_ids: Sequence[int]
    sampling_params: Sampling | None


@dataclass(slots=True)
class Step:
    """A step under way: its requests, those that decode, drafted rows and prompt tokens; the drafter's pass so far."""

    began: float
    requests: frozenset[str]
    decoding: int
    drafted: int
    prompt: int
    width: int = 0
    drafter_s: float = 0.0

    def end(self, now: float) -> Measured:
        """Return what it took, from its beginning until now."""
        target_s = now - self.began - self.drafter_s
        batch = len(self.requests)
        return Measured(self.decoding, self.drafted, target_s, self.width, self.drafter_s, batch, self.prompt)


def begin_step(now: float, output: Output, requests: Mapping[str, State]) -> Step:
    """Begin a step; `requests`: the runner's, before it takes in this output.

    A request decodes that has tokens of its own and is given one more, and its drafts. One that is preempted reads
    anew what it had; one whose prompt ends in this step is not among those that decode before the next.
    """
    scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
    drafted = sum(map(len, drafts.values()))
    total = output.total_num_scheduled_tokens
    decoding = len(scheduled)
    if output.scheduled_new_reqs or total != decoding + drafted:
        decoding = sum(
            tokens == 1 + len(drafts.get(request, ())) and request in requests and has_answered(requests[request])
            for request, tokens in scheduled.items()
        )
    return Step(now, frozenset(scheduled), decoding, drafted, total - decoding - drafted)


def has_answered(state: State) -> bool:
    """Whether a request has tokens of its own."""
    return bool(state.output_token_ids)


def count_left(state: State, tokens: int, most: int) -> int:
    """Count the tokens that a request may still get, after `tokens` that are not in its books yet; `most`: for any."""
    limit = None if state.sampling_params is None else state.sampling_params.max_tokens
    return (most if limit is None else limit) - len(state.output_token_ids) - tokens
