"""One budget of rows for the proposals of all requests in a pass.

The likeliest states per row are taken first, whichever request they are of: the more requests share a pass, the less
room is left, and speculation shrinks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from laguna_serve.plugins.diffusion.decoding.canvas import State
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Run


def share_rows(
    runs: Sequence[Run],
    proposals: Sequence[Sequence[Proposal]],
    budget: int,
    count_rows: Callable[[Run, State], int],
) -> list[list[State]]:
    """Choose states for each run, by falling chance per row, that take at most `budget` rows in all.

    A state that is proposed twice, or is the run's own, is not taken again.
    """
    offered = [
        (-proposal.chance / rows, number, place, proposal.state, rows)
        for number, of_run in enumerate(proposals)
        for place, proposal in enumerate(of_run)
        if (rows := count_rows(runs[number], proposal.state))
    ]
    chosen: list[list[State]] = [[] for _ in runs]
    for _, number, _, state, rows in sorted(offered):
        if rows <= budget and state != runs[number].state and state not in chosen[number]:
            chosen[number].append(state)
            budget -= rows
    return chosen
