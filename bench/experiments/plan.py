"""Which steps run, in which order, within which time: from the list's order of worth and the estimates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from laguna_serve.bench.experiments.options import CampaignConfig
from laguna_serve.bench.experiments.result import FINISHED, CampaignPlan, PlannedStep, StepRun
from laguna_serve.bench.experiments.step import (
    DENSE_RANDOM,
    ROOT,
    XS2,
    XS2_DRAFT,
    XS2_PRUNED,
    Step,
    list_named,
)
from laguna_serve.bench.experiments.steps import STEPS
from laguna_serve.serving.kit.errors import CommandError

GIVEN = (XS2, XS2_DRAFT, XS2_PRUNED)
# A step that makes what others need.
MAKERS = {DENSE_RANDOM: "dense-generate"}
BUDGET_ENDED = "the budget ended"


class PlanError(CommandError):
    """A campaign that cannot be planned; one line."""


def choose_steps(config: CampaignConfig) -> list[Step]:
    """Choose the steps of the parts and names that were asked for, in the list's order.

    Raises:
        PlanError: there is no step of that name among them.
    """
    steps = [step for step in STEPS if not config.part or step.part in config.part]
    names = {step.name for step in steps}
    if unknown := [name for name in config.step if name not in names]:
        where = f" in {', '.join(config.part)}" if config.part else ""
        raise PlanError(f"--step: expected steps{where} (--plan lists them), got {', '.join(unknown)}; check the names")
    return [step for step in steps if not config.step or step.name in config.step]


def group_runs(config: CampaignConfig, entries: Iterable[StepRun]) -> dict[str, list[StepRun]]:
    """Group earlier attempts by step, in order, without those of other checkpoints than the user gives now."""
    commands = {step.name: step.rehearsal if config.rehearse else step.command for step in STEPS}
    runs: dict[str, list[StepRun]] = {}
    given = config.identify_given()
    for run in entries:
        named = list_named(commands.get(run.step, ()), given)
        if all(run.checkpoints.get(name) == given[name] for name in named):
            runs.setdefault(run.step, []).append(run)
    return runs


def make_plan(
    config: CampaignConfig, runs: Mapping[str, Sequence[StepRun]], budget_s: float | None = None
) -> CampaignPlan:
    """Take steps from the front while their estimates fit.

    `runs`: earlier attempts by step; `budget_s`: what is left of the budget, the whole of it by default.

    Raises:
        PlanError: as `choose_steps`.
    """
    planned: list[PlannedStep] = []
    left_s = config.budget_s if budget_s is None else budget_s
    ready = {name for name in runs if is_finished(name, runs, config)}
    # What has used up a budget by itself comes behind what has not had its turn.
    for step in sorted(choose_steps(config), key=lambda step: _was_greedy(runs.get(step.name, ()))):
        left_out = why_not(step, config, runs) or _find_missing_maker(step, ready)
        if left_out is None and not config.rehearse and step.estimate_s > left_s:
            left_out = f"takes about {step.estimate_s} s, and {max(0, left_s):.0f} s of the budget are left"
        if left_out is None:
            left_s -= step.estimate_s
            ready.add(step.name)
        planned.append(describe_step(step, left_out))
    total_s = sum(item.estimate_s for item in planned if item.left_out is None)
    return CampaignPlan(budget_s=config.budget_s, planned_s=total_s, steps=planned, rehearsed=config.rehearse)


def describe_step(step: Step, left_out: str | None) -> PlannedStep:
    """Describe a step and whether it is to run."""
    return PlannedStep(
        step=step.name,
        part=step.part,
        row=step.row,
        estimate_s=step.estimate_s,
        limit_s=step.limit_s,
        synthetic=step.synthetic,
        left_out=left_out,
    )


def why_not(step: Step, config: CampaignConfig, earlier: Mapping[str, Sequence[StepRun]]) -> str | None:
    """Why a step cannot or need not run, whatever the time; None if it should. `earlier`: attempts by step."""
    runs = earlier.get(step.name, ())
    if step.by_hand:
        return f"by hand: {step.by_hand}"
    if config.rehearse and not step.rehearsal:
        return "nothing to rehearse on a CPU"
    if is_finished(step.name, earlier, config):
        return f"done on {runs[-1].device}"
    if runs and runs[-1].outcome not in ("stopped", *FINISHED):
        attempts = sum(run.outcome != "stopped" for run in runs)
        if not config.retry:
            return f"{runs[-1].outcome} before: --retry runs it once more"
        if attempts > 1:
            return f"{runs[-1].outcome} {attempts} times: see {runs[-1].folder}"
    return _find_missing_input(step, config)


def is_finished(name: str, earlier: Mapping[str, Sequence[StepRun]], config: CampaignConfig) -> bool:
    """Whether a step need not run again: it has ended, and a checkpoint that it made is there if one still needs it."""
    runs, folder = earlier.get(name, ()), config.made_up
    if not runs or runs[-1].outcome not in FINISHED:
        return False
    made = next((place for place, maker in MAKERS.items() if maker == name), None)
    if made is None or folder is None or (folder / made.strip("{}") / "config.json").is_file():
        return True
    needing = [step.name for step in choose_steps(config) if made in step.needs]
    return all(is_finished(step, earlier, config) for step in needing)


def _was_greedy(runs: Sequence[StepRun]) -> bool:
    """Whether the budget's end stopped it when it had had its time."""
    return bool(runs) and runs[-1].reason == BUDGET_ENDED and runs[-1].wall_s >= runs[-1].estimate_s


def _find_missing_input(step: Step, config: CampaignConfig) -> str | None:
    given = config.list_given()
    for need in step.needs:
        if need in GIVEN:
            if need not in given:
                return f"needs --{need.strip('{}')}"
        elif need not in MAKERS and not (ROOT / need).exists():
            return f"needs {need}, which only a checkout of the repository has"
    return None


def _find_missing_maker(step: Step, ready: set[str]) -> str | None:
    makers = [MAKERS[need] for need in step.needs if need in MAKERS]
    missing = [name for name in makers if name not in ready]
    return f"needs {missing[0]} before it" if missing else None
