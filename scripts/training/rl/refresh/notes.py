"""What a run with a moving drafter is decided by, and what it notes of its steps."""

from __future__ import annotations

import msgspec


class RefreshRun(msgspec.Struct, frozen=True, kw_only=True):
    """What decides about the refreshes of a run.

    Attributes:
        every: steps between two of them.
        steps, lr: of training in each.
        replay: sampled rollouts that are kept to learn from.
        greedy_share: of the answers that are learned from, how many are greedy ones.
        threads: torch's, on which the order of sums depends.
    """

    every: int
    steps: int
    lr: float
    replay: int
    greedy_share: float
    threads: int


class GateNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A new drafter held against the serving one on rollouts that neither learned from in this refresh.

    Attributes:
        candidate: the version that it gets, if it is pushed.
        pushed: it was; `reason` says why not.
        serving_tau, candidate_tau: tokens per step on the newest policy's rollouts, by the exact count.
        p_worse: one-sided p of the paired test against "worse by the margin or more".
        prompts: over which it was paired.
        serving_greedy_tau, candidate_greedy_tau: the same on greedy answers, which are noted and not tested.
        rollouts: that were learned from, of which `greedy` are greedy ones.
        loss: mean over the last quarter of the training steps.
    """

    candidate: str
    pushed: bool
    reason: str | None = None
    serving_tau: float
    candidate_tau: float
    p_worse: float | None
    prompts: int
    serving_greedy_tau: float | None = None
    candidate_greedy_tau: float | None = None
    rollouts: int
    greedy: int
    loss: float


class LiveNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A pushed drafter's live acceptance against what the first drafter would have had on the same rollouts.

    Attributes:
        places: of a draft that are compared: all, or the first where γ changes from step to step.
        live, frozen: tokens per step within these places: the engine's counters, and the exact count.
        p_below: one-sided p of the test that live acceptance is below the frozen one's, less a margin.
        rolled_back_to: the version that is pushed in its place.
    """

    places: int
    live: float
    frozen: float
    p_below: float | None
    rolled_back_to: str | None = None


class DrafterNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step tells of the drafter.

    Attributes:
        version: of the drafter that speculated in this step: "d-2:step-8" is the second one, learned beside step-8.
        pushed: that goes to the engine with this step's new policy.
    """

    version: str
    pushed: str | None = None
    live: LiveNote | None = None
    gate: GateNote | None = None


def describe_drafter(note: DrafterNote) -> list[str]:
    """Describe what became of the drafter in a step."""
    parts = []
    if note.live is not None and note.live.rolled_back_to is not None:
        shown = f"live τ {note.live.live:.3f} below the first drafter's {note.live.frozen:.3f}"
        parts.append(f"{note.version} taken back for {note.live.rolled_back_to}: {shown}")
    if note.gate is not None:
        taus = f"τ {note.gate.serving_tau:.3f} → {note.gate.candidate_tau:.3f}"
        parts.append(f"{note.gate.candidate} {'pushed' if note.gate.pushed else 'refused'}: {taus}")
    return parts
