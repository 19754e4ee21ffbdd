"""The result of a campaign: `campaign.json`, schema laguna_serve.campaign/1; its journal is of `StepRun`s."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from laguna_serve.serving.kit.environment import Environment

Outcome = Literal["held", "fell short", "failed", "timed out", "stopped"]
# What is not run again; `stopped` is: by a person, or by the end of the budget.
FINISHED: tuple[Outcome, ...] = ("held", "fell short")


class StepRun(Struct, frozen=True, kw_only=True):
    """One attempt at one step.

    Attributes:
        outcome: by its exit status (0, 1, any other), its time limit, or who stopped it.
        device: the GPU's name, or the processor's; `rehearsed`: at toy size.
        commit: of the code that ran, with "+" when files differed from it.
        command: as it ran.
        checkpoints: what the user's checkpoints that it names were, by placeholder: their content, or a hub id.
        folder: of its files, below the campaign's.
        figures: what came out, from its result file.
        reason: of a failure, the last line of its log.
    """

    step: str
    outcome: Outcome
    status: int | None
    device: str
    rehearsed: bool
    commit: str | None
    started: str
    wall_s: float
    estimate_s: int
    command: list[str]
    folder: str
    schema: str | None
    figures: list[str]
    reason: str | None
    checkpoints: dict[str, str] = {}


class PlannedStep(Struct, frozen=True, kw_only=True):
    """A step as the plan has it. `left_out`: why it is not to run, None if it is."""

    step: str
    part: str
    row: int
    estimate_s: int
    limit_s: int
    synthetic: bool
    left_out: str | None


class CampaignPlan(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.campaign_plan/1"):
    """What would run within the budget, in order; seconds are of one H100 and estimated.

    Attributes:
        rehearsed: at toy size on a CPU, of which they say nothing: all steps are planned.
    """

    budget_s: float
    planned_s: int
    steps: list[PlannedStep]
    rehearsed: bool = False


class CampaignResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.campaign/1"):
    """What was run, on whichever machines, and what was not.

    Attributes:
        environment: of the last machine.
        runs: every attempt, in order; of a step the last one counts.
        left_out: step → why it was not run.
        interrupted: a person ended it early.
    """

    environment: Environment
    rehearsed: bool
    budget_s: float
    used_s: float
    runs: list[StepRun]
    left_out: dict[str, str]
    interrupted: bool

    @property
    def last_runs(self) -> dict[str, StepRun]:
        """Step → its last attempt."""
        return {run.step: run for run in self.runs}

    @property
    def held(self) -> bool:
        """Say whether all that ran to its end held; a budget that ended is no failure."""
        return all(run.outcome in ("held", "stopped") for run in self.last_runs.values())
