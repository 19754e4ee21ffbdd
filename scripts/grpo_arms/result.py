"""What the arms of a comparison came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from laguna_serve.scripts.training.rl.steps import GrpoRun, Step, StepSeconds
from laguna_serve.serving.kit.environment import Environment

Arm = Literal["frozen", "refreshed", "none"]
ARMS: tuple[Arm, ...] = ("frozen", "refreshed", "none")
# The steps of a run over which the last acceptance is pooled: one step's drafts are few.
LAST = 5
# What (τ − 1) of the refreshed drafter is to be of the frozen one's.
BAR = 1.5


class ArmRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run: an arm with a seed."""

    arm: Arm
    seed: int
    environment: Environment
    run: GrpoRun
    log: tuple[Step, ...]


class ArmSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in figures; None where there is nothing to measure, or the goal was not reached.

    Attributes:
        held_out_reward: before the first step, and after the last.
        tau_first, tau_last: tokens per step over the drafts of the first, and of the last, five policy versions.
        frozen_tau_last: what the first drafter would have had on the last five versions' rollouts (exact count).
        greedy_first, greedy_last: tokens per step on greedy answers to held-out prompts.
        tokens_per_core_s: rollout tokens per processor second of the engine.
        with_refresh_per_core_s: the same with the drafter's training and checks added to the engine's time.
        refresh_share: of the processor time of a step, what these take.
        seconds_to_goal, core_s_to_goal: until the held-out reward is first measured at the goal, measurements left out.
        pushed, refused, rolled_back: drafters.
    """

    arm: Arm
    seed: int
    steps: int
    held_out_reward: tuple[float, float]
    tau_first: float | None
    tau_last: float | None
    frozen_tau_last: float | None
    greedy_first: float | None
    greedy_last: float | None
    tokens_per_core_s: float
    with_refresh_per_core_s: float
    refresh_share: float
    seconds_to_goal: float | None
    core_s_to_goal: float | None
    pushed: int
    refused: int
    rolled_back: int


class ArmsResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.grpo_arms/1"):
    """Every run, and what it came to. `gains`: (τ − 1) of the refreshed ÷ that of the frozen drafter, by seed."""

    goal: float
    runs: tuple[ArmRun, ...]
    summaries: tuple[ArmSummary, ...]
    gains: dict[str, float]

    @property
    def holds(self) -> bool:
        """Every seed reaches the bar."""
        return bool(self.gains) and min(self.gains.values()) >= BAR


def summarise(run: ArmRun, goal: float) -> ArmSummary:
    """Work out the figures of a run."""
    steps = [step for step in run.log if step.seconds is not None and step.processor_s is not None]
    held_out = [step.held_out_reward for step in run.log if step.held_out_reward is not None]
    greedy = [step.held_out_greedy_length for step in run.log if step.held_out_greedy_length is not None]
    tokens = sum(step.tokens or 0 for step in steps)
    engine = sum(_processor(step).rollouts for step in steps)
    refresh = sum(_processor(step).refresh or 0.0 for step in steps)
    notes = [step.drafter for step in steps if step.drafter is not None]
    gates = [note.gate for note in notes if note.gate is not None]
    wall, core = find_clock(steps)
    reached = _find_goal(run.log, goal)
    return ArmSummary(
        arm=run.arm,
        seed=run.seed,
        steps=len(steps),
        held_out_reward=(held_out[0], held_out[-1]),
        tau_first=pool_tau(steps[:LAST]),
        tau_last=pool_tau(steps[-LAST:]),
        frozen_tau_last=_pool_frozen(steps[-LAST:]),
        greedy_first=greedy[0] if greedy else None,
        greedy_last=greedy[-1] if greedy else None,
        tokens_per_core_s=tokens / engine,
        with_refresh_per_core_s=tokens / (engine + refresh),
        refresh_share=refresh / core[-1],
        seconds_to_goal=None if reached is None else wall[reached],
        core_s_to_goal=None if reached is None else core[reached],
        pushed=sum(gate.pushed for gate in gates),
        refused=sum(not gate.pushed for gate in gates),
        rolled_back=sum(note.live is not None and note.live.rolled_back_to is not None for note in notes),
    )


def find_clock(steps: Sequence[Step]) -> tuple[list[float], list[float]]:
    """Add up wall and processor seconds before each step, and after the last; measurements left out."""
    wall, core = [0.0], [0.0]
    for step in steps:
        if step.seconds is not None and step.processor_s is not None:
            wall.append(wall[-1] + step.seconds.total)
            core.append(core[-1] + step.processor_s.total)
    return wall, core


def pool_tau(steps: Sequence[Step]) -> float | None:
    """Pool tokens per step over the drafts of some policy versions; None without drafts."""
    drafts = sum(step.drafts or 0 for step in steps)
    accepted = sum((step.drafts or 0) * ((step.acceptance_length or 1.0) - 1) for step in steps)
    return 1 + accepted / drafts if drafts else None


def find_gains(summaries: Sequence[ArmSummary]) -> dict[str, float]:
    """Find (τ − 1) of the refreshed drafter ÷ that of the frozen one at the last versions, by seed."""
    taus = {(summary.arm, summary.seed): summary.tau_last for summary in summaries}
    gains = {}
    for seed in sorted({summary.seed for summary in summaries}):
        frozen, refreshed = taus.get(("frozen", seed)), taus.get(("refreshed", seed))
        if frozen is not None and refreshed is not None and frozen > 1:
            gains[str(seed)] = (refreshed - 1) / (frozen - 1)
    return gains


def _processor(step: Step) -> StepSeconds:
    assert step.processor_s is not None
    return step.processor_s


def _pool_frozen(steps: Sequence[Step]) -> float | None:
    lives = [step.drafter.live.frozen for step in steps if step.drafter is not None and step.drafter.live is not None]
    return sum(lives) / len(lives) if lives else None


def _find_goal(log: Sequence[Step], goal: float) -> int | None:
    """Find the number of gradient steps after which the goal was first measured."""
    return next((s.step for s in log if s.held_out_reward is not None and s.held_out_reward >= goal), None)
