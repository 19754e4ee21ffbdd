"""Which problems a policy may train on, and which are held out.

A problem's side depends on its task id and the seed alone: it stays where it is when problems are added, removed or
reordered, and whatever machine asks. So a held-out share is an expectation; small sets come out a little uneven.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from laguna_serve.evals.problems.problem import Problem

HELD_OUT_SHARE = 0.25


def is_held_out(task_id: str, share: float = HELD_OUT_SHARE, seed: int = 0) -> bool:
    """Say whether an id is held out, as about `share` (above 0, below 1) of all are.

    A larger share keeps what a smaller one held out.

    Raises:
        ValueError: a share that leaves nothing on one side.
    """
    if not 0 < share < 1:
        raise ValueError(f"held-out share: expected above 0 and below 1, got {share:g}")
    digest = hashlib.sha256(f"{task_id}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def split_problems(
    problems: Sequence[Problem], share: float = HELD_OUT_SHARE, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Split the problems into those to train on and the held-out ones, each in the order given.

    Raises:
        ValueError: a share out of range, or a side without a problem.
    """
    train = [problem for problem in problems if not is_held_out(problem.task_id, share, seed)]
    held_out = [problem for problem in problems if is_held_out(problem.task_id, share, seed)]
    if not train or not held_out:
        got = f"got {len(train)} to train on and {len(held_out)} held out of {len(problems)}"
        raise ValueError(f"split: expected problems on both sides, {got}; choose another share or seed")
    return train, held_out
